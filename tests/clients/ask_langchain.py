"""Run by LangChain's own Python: ``ask_langchain.py URL`` prints what came back as JSON."""

import json
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

ABOUT = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "M"}


class Place(BaseModel):
    """A town and how it is there."""

    town: Literal["Oslo", "Rome"]
    is_warm: bool


@tool
def weather(town: Literal["Oslo", "Rome"]) -> str:
    """The weather of a town."""
    return town


chat = ChatOpenAI(**ABOUT, temperature=0, max_tokens=12, seed=1)
longer = ChatOpenAI(**ABOUT, temperature=0, max_tokens=80)
whole = chat.invoke("hello")
streamed = list(chat.stream("hello"))
place = longer.with_structured_output(Place, method="json_schema").invoke("where?")
called = longer.bind_tools([weather], tool_choice="weather", strict=True).invoke("what is it like?")
text = OpenAI(**ABOUT, temperature=0, max_tokens=5).invoke("hello")
vectors = OpenAIEmbeddings(**ABOUT, check_embedding_ctx_length=False).embed_documents(["a", "b"])
batch = chat.batch(["one", "two", "three"])
print(
    json.dumps(
        {
            "whole": whole.content,
            "streamed": "".join(chunk.content for chunk in streamed),
            "tokens": whole.usage_metadata["output_tokens"],
            "place": place.model_dump(),
            "call": called.tool_calls[0]["name"],
            "arguments": called.tool_calls[0]["args"],
            "text": text,
            "vectors": [len(vector) for vector in vectors],
            "batch": len(batch),
        }
    )
)
