"""What clients send: the interfaces of OpenAI, and what vLLM and Cohere add to them. A field that is not known here is an
error, if it could change the result."""

import base64
import io
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .config import ServeArguments
from .fetch import fetch


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # for some others Pillow would start programs
IGNORED = {"user", "name", "refusal", "annotations", "detail", "include_obfuscation"}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


def _parts(content: Any) -> Any:
    content = content["content"] if isinstance(content, dict) and content.keys() == {"content"} else content
    if not isinstance(content, str | list):
        raise ValueError("give a text, a list of parts, or {'content': ...}; numbers of tokens are not taken")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and key not in IGNORED}


Text = Annotated[str, AfterValidator(_whole)]


class Part(Schema):
    type: Literal["text", "image_url"]
    text: Text = ""
    image_url: Annotated[Text, BeforeValidator(lambda v: v.get("url") if isinstance(v, dict) else v)] = ""

    @model_validator(mode="after")
    def _has_its_content(self) -> "Part":
        if self.model_fields_set != {"type", self.type}:
            raise ValueError(f"a part of the type {self.type!r} has the field `{self.type}` and no other")
        return self


Content = Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]
Listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class Retrieval(Schema):
    k: int = Field(1, ge=1, le=100)


class StreamOptions(Schema):
    include_usage: bool = False


class Request(Schema):
    model: Text | None = None


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float = Field(0, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1), AfterValidator(_whole)]], Listed] = Field(
        [], max_length=16
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    retrieval: Retrieval | None = None
    n: int = Field(1, ge=1, le=1)  # as clients may send it


class EmbeddingRequest(Request):
    input: Annotated[list[Content], Listed] = Field([], max_length=2048)
    messages: list[Message] = []
    input_type: Literal["query", "document"] | None = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"

    @model_validator(mode="after")
    def _something(self) -> "EmbeddingRequest":
        if bool(self.input) == bool(self.messages):
            raise ValueError("give either `input` or `messages`, not empty")
        return self


class RerankRequest(Request):
    query: Content
    documents: list[Content] = Field(min_length=1, max_length=2048)
    top_n: int | None = Field(None, ge=1)


class SearchRequest(Request):
    query: Content
    k: int = Field(5, ge=1, le=1000)


async def read_contents(contents: dict[str, list[Part]], limits: ServeArguments) -> list[list[dict[str, Any]]]:
    """The parts of all messages or inputs of a request, as [`~models.rows_sugar.as_row`] takes them; errors call them by their keys.
    Pictures stay encoded: of each only the header is read here."""
    result, pixels, left = [], 0, limits.max_body
    for where, content in contents.items():
        result.append([])
        for number, part in enumerate(content):
            if part.type == "text":
                result[-1].append({"type": "text", "text": part.text})
                continue
            name = f"`{where}[{number}]`: the picture"
            data, size = await _image(part.image_url, name, limits, left)
            pixels, left = pixels + size, left - len(data)
            if pixels > limits.max_pixels:
                raise ValueError(f"{name} has more than {limits.max_pixels} pixels, together with those before it.")
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


async def _image(url: str, name: str, limits: ServeArguments, max_bytes: int) -> tuple[bytes, int]:
    """The content of an image file, of at most `max_bytes` if it is fetched, and its number of pixels."""
    if url[:8].lower().startswith(("http://", "https://")):
        if not limits.allow_urls:
            raise ValueError(f"{name} is not fetched: this server takes data URLs alone.")
        try:
            content = await fetch(url, max_bytes, limits.body_timeout)
        except ValueError as error:
            raise ValueError(f"{name} cannot be had, its web address {error}.") from error
    else:
        head, _, data = url.rpartition(",")
        try:
            if head and not (head.lower().startswith("data:") and head.lower().endswith(";base64")):
                raise ValueError
            content = base64.b64decode(data, validate=True)
        except ValueError:
            message = "is neither base64 nor `data:image/png;base64,...`; files and other addresses are not read."
            raise ValueError(f"{name} {message}") from None
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return content, image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name} has more than {limits.max_pixels} pixels.") from None
    except Exception as error:  # whatever a header makes of Pillow
        raise ValueError(f"{name} is none of {', '.join(FORMATS)}, or damaged.") from error
