"""The block `tokenizer` of a recipe: the vocabulary of the result, and where the rows of its tokens come from."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lewis.recipe.block import Block, ModelName


class TokenRow(Block):
    """Where a token's row comes from: all zeros (`zero`), or the row of a token of a model (`model_token`)."""

    kind: Literal["zero", "model_token"]
    model: ModelName | None = None
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_row(self) -> "TokenRow":
        given = (self.model, self.token if self.token is not None else self.token_id)
        if self.kind == "zero" and (given != (None, None)):
            raise ValueError("kind zero takes no model or token")
        if self.kind == "model_token" and (None in given or None not in (self.token, self.token_id)):
            raise ValueError("kind model_token needs a model, and either token or token_id")
        return self


def _kind_of_source(value: Any) -> str:
    return "TokenRow" if isinstance(value, TokenRow) or (isinstance(value, dict) and "kind" in value) else "ModelName"


class TokenEmbedding(Block):
    """The embedding row of one token, for the models that lack it.

    Attributes:
        source: a model, or a `TokenRow`; None: the rule of `lewis.merging.vocabulary.tokens`.
        force: use it in the models that have the token, too.
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
    """The vocabulary of the result: mergekit's `tokenizer`.

    Attributes:
        source: `base`, `union`, or one of the models.
        tokens: token -> where its row comes from; a token that no model has is added.
        pad_to_multiple_of: embeddings have one row per token, rounded up to a multiple of this.
    """

    source: ModelName = "union"
    tokens: dict[Annotated[str, Field(min_length=1)], TokenEmbedding] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=1 << 20)
