"""`chat_template`: how the result's tokenizer writes a chat; a name of a format, `auto`, or a Jinja template."""

from typing import Annotated

from pydantic import AfterValidator, Field

from lewis.errors import nearest

AUTO = "auto"
_EACH = "{% for message in messages %}"
_ALPACA = "### {{ {'user': 'Instruction', 'assistant': 'Response'}[message.role] }}:\n{{ message.content | trim }}"
_LLAMA3 = "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
FORMATS = {  # by mergekit's names; written from the formats' descriptions
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
    return given


ChatTemplate = Annotated[str, Field(min_length=1), AfterValidator(_checked)]


def text_of(given: str) -> str:
    """The Jinja text of a format's name, or of a template itself."""
    return FORMATS.get(given, given)
