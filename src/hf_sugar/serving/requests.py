"""What clients send: the interfaces of OpenAI, and what vLLM, Cohere and Jina add to them. A field that would change the
result and is not known here is an error."""

import base64
import binascii
import io
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from .config import ServeArguments
from .fetch import fetch


# by their content; Pillow would start other programs for some more
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Ignored = Annotated[Any, Field(exclude=True)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class ImageURL(Schema):
    url: Text
    detail: Ignored = None


class Part(Schema):
    type: Literal["text", "image_url"]
    text: Text = ""
    image_url: Annotated[ImageURL | None, BeforeValidator(lambda v: {"url": v} if isinstance(v, str) else v)] = None

    @model_validator(mode="after")
    def _has_its_content(self) -> "Part":
        if self.type not in self.model_fields_set or len(self.model_fields_set) != 2:
            raise ValueError(f"a part of the type {self.type!r} has the field `{self.type}` and no other")
        return self


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None


class Item(Schema):
    """One thing that is embedded: a text, or `{"content": [parts]}`."""

    content: Content

    @model_validator(mode="before")
    @classmethod
    def _of_a_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"content": data}
        if not isinstance(data, dict):
            raise ValueError("give a text or {'content': [...]}; numbers of tokens are not taken")
        return data


class Request(Schema):
    model: Text | None = None
    user: Ignored = None


class Retrieval(Schema):
    k: int = Field(1, ge=1, le=100)


class StreamOptions(Schema):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float = Field(0, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1)]], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
    ] = Field([], max_length=16)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    retrieval: Retrieval | None = None
    # as every client may send them; other values are not supported
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)


class EmbeddingRequest(Request):
    input: list[Item] = Field([], max_length=2048)
    messages: list[Message] = []
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"

    @field_validator("input", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _something(self) -> "EmbeddingRequest":
        if bool(self.input) == bool(self.messages):
            raise ValueError("give either `input` or `messages`, not empty")
        return self


class RerankRequest(Request):
    query: Item
    documents: list[Item] = Field(min_length=1, max_length=2048)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class SearchRequest(Request):
    query: Item
    k: int = Field(5, ge=1, le=1000)


async def read_contents(contents: dict[str, list[Part]], limits: ServeArguments) -> list[list[dict[str, Any]]]:
    """The parts of one conversation or input, as [`~inference.as_row`] takes them; errors call them by their keys. Pictures
    stay encoded: of each only the header is read here."""
    result, pixels = [], 0
    for where, content in contents.items():
        result.append([])
        for number, part in enumerate(content):
            if part.type == "text":
                result[-1].append({"type": "text", "text": part.text})
                continue
            data, size = await _image(part.image_url.url, f"{where}[{number}]", limits)
            pixels += size
            if pixels > limits.max_pixels:
                raise ValueError(f"`{where}[{number}]`: more than {limits.max_pixels} pixels, with those before.")
            result[-1].append({"type": "image", "image": data})
    return result


async def read_messages(messages: list[Message], limits: ServeArguments) -> dict[str, Any]:
    """A row in the conversational vision format."""
    contents = {f"messages[{n}].content": message.content for n, message in enumerate(messages)}
    images, turns = [], []
    for message, parts in zip(messages, await read_contents(contents, limits), strict=True):
        images += [part["image"] for part in parts if part["type"] == "image"]
        content = [{"type": part["type"], "text": part.get("text")} for part in parts]
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return {"messages": turns, "images": images}


async def _image(url: str, where: str, limits: ServeArguments) -> tuple[bytes, int]:
    """The content of an image file, and its number of pixels."""
    head, comma, data = url.partition(",")
    if url[:8].lower().startswith(("http://", "https://")):
        if not limits.allow_urls:
            raise ValueError(
                f"`{where}`: web addresses are not fetched by this server; send the picture as a data URL."
            )
        try:
            content = await fetch(url, limits.max_body, limits.body_timeout)
        except ValueError as error:
            raise ValueError(f"`{where}`: the web address {error}.") from error
    else:
        if not comma:
            data = head
        elif not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
            raise ValueError(f"`{where}`: the picture is neither base64 nor a data URL `data:image/png;base64,...`.")
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"`{where}`: the picture is not base64; files and other addresses are not read."
            ) from error
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return content, image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"`{where}`: the picture has more than {limits.max_pixels} pixels.") from error
    except Exception as error:  # whatever a header makes of Pillow
        raise ValueError(f"`{where}`: the picture is none of {', '.join(FORMATS)}, or damaged.") from error
