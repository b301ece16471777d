"""The recipe keys `tokenizer` and `chat_template`: vocabulary, embedding rows and chat format of the merged model."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from lewis.errors import nearest
from lewis.recipe.block import Block, ModelName


class TokenRow(Block):
    """The source of a token's embedding row: zeros (`zero`), or the row of a token in a model (`model_token`)."""

    kind: Literal["zero", "model_token"]
    model: ModelName | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    def _contradictions(self) -> Iterator[str]:
        given = (self.model, self.token if self.token is not None else self.token_id)
        if self.kind == "zero" and (given != (None, None)):
            yield ": kind zero takes no model or token"
        if self.kind == "model_token" and (None in given or None not in (self.token, self.token_id)):
            yield ": kind model_token needs a model, and either token or token_id"


def _kind_of_source(value: Any) -> str:
    return "TokenRow" if isinstance(value, TokenRow) or (isinstance(value, dict) and "kind" in value) else "ModelName"


class TokenEmbedding(Block):
    """The embedding row of one token, for the models that lack it.

    Attributes:
        source: the row's source, a model or a `TokenRow`; None: by the rule of `lewis.merging.vocabulary.tokens`.
        force: whether the row is also used for the models that have the token.
    """

    source: (
        Annotated[
            Annotated[ModelName, Tag("ModelName")] | Annotated[TokenRow, Tag("TokenRow")],
            Discriminator(_kind_of_source),
        ]
        | None
    ) = None
    force: bool = False


class Tokenizer(Block):
    """The vocabulary of the merged model: mergekit's `tokenizer`.

    Attributes:
        source: where the vocabulary comes from: `base`, `union`, or one of the models.
        tokens: token -> the source of its row; a token that no model has is added.
        pad_to_multiple_of: the number, at most 65,536, to a multiple of which the embedding rows are padded.
    """

    source: ModelName = "union"
    tokens: dict[Annotated[str, Field(min_length=1)], TokenEmbedding] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=1 << 16)


AUTO = "auto"
_EACH = "{% for message in messages %}"
_ALPACA = "### {{ {'user': 'Instruction', 'assistant': 'Response'}[message.role] }}:\n{{ message.content | trim }}"
_LLAMA3 = "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
FORMATS = {  # mergekit's name of a chat format -> its template, written from the format's description
    "alpaca": f"{{{{ bos_token }}}}{_EACH}{{% if message.role == 'system' %}}{{{{ message.content | trim }}}}"
    f"{{% else %}}{_ALPACA}{{% if message.role == 'assistant' %}}{{{{ eos_token }}}}{{% endif %}}{{% endif %}}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "chatml": f"{_EACH}<|im_start|>{{{{ message.role }}}}\n{{{{ message.content }}}}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "exaone": f"{_EACH}[|{{{{ message.role }}}}|]{{{{ message.content }}}}"
    "{% if message.role == 'user' %}\n{% else %}[|endofturn|]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}",
    "llama3": f"{{{{ bos_token }}}}{_EACH}{_LLAMA3}{{% endfor %}}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": f"{{{{ bos_token }}}}{_EACH}{{% if message.role == 'assistant' %}} {{{{ message.content | trim }}}}"
    "{{ eos_token }}{% else %}[INST] {{ message.content | trim }} [/INST]{% endif %}{% endfor %}",
}


def _checked(given: str) -> str:
    if given == AUTO or given in FORMATS:
        return given
    if "{" not in given:
        raise ValueError(f"expected auto, a format or a Jinja template, got {given!r}{nearest(given, FORMATS)}")
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(given)
    except TemplateSyntaxError as error:
        raise ValueError(f"not a valid Jinja template: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ValueError("not a valid Jinja template: nested too deep; is this the right text?") from error
    return given


ChatTemplate = Annotated[str, Field(min_length=1), AfterValidator(_checked)]


def text_of(given: str) -> str:
    """Return the Jinja template of a chat format's name; a text that is no such name is returned unchanged."""
    return FORMATS.get(given, given)
