"""Request and response schemas. `/v1/rerank`, `/pooling` and `/classify` follow Jina and vLLM."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, strict=True)]


class Strict(BaseModel):
    """A request in tracereward's own format: unknown fields are rejected by name."""

    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """A request in another server's format: unknown fields are ignored, as clients send fields not used here."""

    model_config = ConfigDict(extra="ignore")


class Message(Lenient):
    """A chat message."""

    role: Text
    content: str


Prompt = Text | Annotated[list[Message], Field(min_length=1)]


class ScoreRequest(Strict):
    """Traces of one prompt: a completion, candidates, or the steps of one trace."""

    model: str | None = None
    prompt: Prompt = Field(description="As in training, including the task's instructions; or messages.")
    completion: Text | None = None
    candidates: Annotated[list[Text], Field(min_length=1)] | None = None
    steps: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Joined by the reward model's step delimiter."
    )
    finished: bool = Field(True, description="Whether the traces end with the end of sequence, not at a length limit.")
    tokens: bool = Field(True, description="Also return each token's text, offsets and reward.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(value is not None for value in (self.completion, self.candidates, self.steps)) != 1:
            raise ValueError("give one of completion, candidates and steps")
        return self


class Score(BaseModel):
    """Rewards of one trace, in log-odds; see `tracereward score`."""

    index: int
    reward: float
    probability: float | None = Field(None, description="That the trace is correct; calibrated reward models only.")
    aggregates: dict[str, float]
    step_rewards: list[float]
    tokens: list[str] | None = None
    offsets: list[tuple[int, int]] | None = None
    token_rewards: list[float] | None = None


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class ScoreResponse(BaseModel):
    """Scores in the order of the traces."""

    model: str
    results: list[Score]
    usage: Usage


class Document(Lenient):
    """A document as an object."""

    text: Text


class RerankRequest(Lenient):
    """Request of Jina and Cohere: documents are candidates, the query is the prompt."""

    model: str | None = None
    query: Prompt
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class Ranked(BaseModel):
    """One ranked document."""

    index: int
    relevance_score: float = Field(description="In [0, 1]: the calibrated probability, else sigmoid of the reward.")
    reward: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    results: list[Ranked]


class ClassifyRequest(Lenient):
    """Request of vLLM: texts or their token ids, or a conversation whose last message is the assistant's trace."""

    model: str | None = None
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1)]
        | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give one of input and messages")
        if self.messages is not None and self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        return self

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """`input` as a list; a single text or list of ids is wrapped."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class PoolingRequest(ClassifyRequest):
    """Request of vLLM."""

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of little-endian float32 values, one per token."
    )


class Pooled(BaseModel):
    """Token rewards of one input: one row per token, with one number."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | str


class PoolingResponse(BaseModel):
    """Response of vLLM."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class Class(BaseModel):
    """Expert or policy, by the sigmoid of the trace reward."""

    index: int
    label: Literal["policy", "expert"]
    probs: list[float]
    num_classes: int = 2


class ClassifyResponse(BaseModel):
    """Response of vLLM."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: Usage


class ErrorBody(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error has this shape."""

    error: ErrorBody


class Selection(Strict):
    """How the proxy selects: the field ``tracereward`` of a request."""

    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Number of samples to request from the upstream.")
    method: Literal["vote", "sigmoid_vote", "reward", "majority", "shortest"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Sampling temperature; at 0 all samples are identical."
    )


class TextPart(Lenient):
    """A text part of a message; other types are not supported."""

    type: Literal["text"] = "text"
    text: str


def _joined(content: Any) -> Any:
    """Join a list of text parts; return other content unchanged for the validator."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(content) else content


def _only(prompt: Any) -> Any:
    """Unwrap a list of one text."""
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise ValueError(f"give one text, not {len(prompt)} texts")
        return prompt[0]
    return prompt


class ChatMessage(Message):
    """A chat message, its content a text or OpenAI's list of text parts."""

    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class StreamOptions(Lenient):
    """OpenAI's stream options."""

    include_usage: bool | None = Field(None, strict=True)


class Proxied(BaseModel):
    """The fields that the proxy reads. All other fields are forwarded to the upstream unchanged."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="The model's name on the upstream.")
    n: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="Number of choices to return.")
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)] | None = None
    tracereward: Selection | None = Field(None, description="Number of samples and selection method.")


class ChatRequest(Proxied):
    """OpenAI's chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionRequest(Proxied):
    """OpenAI's completion."""

    prompt: Annotated[Text, BeforeValidator(_only, json_schema_input_type=Text | list[Text])] = Field(
        description="One text, or a list of one."
    )


JsonObject = dict[str, Any]
