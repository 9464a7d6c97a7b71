"""What the endpoints take and give. The shapes of `/v1/rerank`, `/pooling` and `/classify` are Jina's and vLLM's."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, strict=True)]


class Strict(BaseModel):
    """A request of our own shape: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid")


class Lenient(BaseModel):
    """A request in another server's shape: clients send fields that mean nothing here."""

    model_config = ConfigDict(extra="ignore")


class Message(Lenient):
    """A chat message."""

    role: Text
    content: str


Prompt = Text | Annotated[list[Message], Field(min_length=1)]


class ScoreRequest(Strict):
    """Traces of one prompt: a completion, candidates, or the steps of one trace."""

    model: str | None = None
    prompt: Prompt = Field(description="As in training: the recipe's words included, or messages.")
    completion: Text | None = None
    candidates: Annotated[list[Text], Field(min_length=1)] | None = None
    steps: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Joined by the reward model's step delimiter."
    )
    finished: bool = Field(True, description="Whether the traces ended by themselves, not at a length limit.")
    tokens: bool = Field(True, description="Give each token's text, offsets and reward too.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(value is not None for value in (self.completion, self.candidates, self.steps)) != 1:
            raise ValueError("give one of completion, candidates and steps")
        return self


class Score(BaseModel):
    """Rewards of one trace, in log-odds; see `tracereward score`."""

    index: int
    reward: float
    probability: float | None = Field(None, description="That the trace is right; of a calibrated reward model.")
    aggregates: dict[str, float]
    step_rewards: list[float]
    tokens: list[str] | None = None
    offsets: list[tuple[int, int]] | None = None
    token_rewards: list[float] | None = None


class Usage(BaseModel):
    """Tokens read."""

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
    """Jina's and Cohere's request: documents are candidates, the query is the prompt."""

    model: str | None = None
    query: Prompt
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class Ranked(BaseModel):
    """One document."""

    index: int
    relevance_score: float = Field(description="In [0, 1]: the calibrated probability, else sigmoid of the reward.")
    reward: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """Documents from best to worst."""

    id: str
    model: str
    object: Literal["list"] = "list"
    usage: Usage
    results: list[Ranked]


class ClassifyRequest(Lenient):
    """vLLM's request: texts or their token ids, or a conversation whose last message is the assistant's trace."""

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
        """`input` as a list, also where it is one text or the ids of one."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class PoolingRequest(ClassifyRequest):
    """vLLM's request."""

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of the numbers as little-endian float32, one a token."
    )


class Pooled(BaseModel):
    """Token rewards of one input: a row of one number for each token."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[list[float]] | str


class PoolingResponse(BaseModel):
    """vLLM's answer."""

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
    """vLLM's answer."""

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
    """How the proxy chooses, in the field ``tracereward`` of a request."""

    n: Annotated[int, Field(ge=1)] | None = Field(None, description="Samples asked of the upstream.")
    method: Literal["vote", "sigmoid_vote", "reward", "majority", "shortest"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Of the samples; at 0 they are all the same."
    )


class TextPart(Lenient):
    """A part of a message; other kinds cannot be read."""

    type: Literal["text"] = "text"
    text: str


def _joined(content: Any) -> Any:
    """The text of a list of text parts; all else as it is, for the validator to judge."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(content) else content


def _only(prompt: Any) -> Any:
    """The text of a list of one."""
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise ValueError(f"give one text, not {len(prompt)}")
        return prompt[0]
    return prompt


class ChatMessage(Message):
    """A chat message, its content a text or OpenAI's list of text parts."""

    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class StreamOptions(Lenient):
    """OpenAI's."""

    include_usage: bool | None = Field(None, strict=True)


class Proxied(BaseModel):
    """What the proxy reads of a request. All other fields, and these as they are, go to the upstream."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="The upstream's name of it.")
    n: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="How many of the best come back.")
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)] | None = None
    tracereward: Selection | None = Field(None, description="How many samples, and how the best is chosen.")


class ChatRequest(Proxied):
    """OpenAI's chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionRequest(Proxied):
    """OpenAI's completion."""

    prompt: Annotated[Text, BeforeValidator(_only, json_schema_input_type=Text | list[Text])] = Field(
        description="One text, or a list of one."
    )


JsonObject = dict[str, Any]
