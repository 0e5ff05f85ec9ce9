"""Run by LiteLLM's own Python: ``ask_litellm.py URL`` prints what came back as JSON."""

import json
import sys

import litellm

ABOUT = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
CHAT = {"model": "openai/M", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Oslo", "Rome"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 60}

whole = litellm.completion(**CHAT, **ABOUT)
streamed = list(litellm.completion(**CHAT, **ABOUT, stream=True, stream_options={"include_usage": True}))
called = litellm.completion(**(CHAT | FORCED), **ABOUT)
text = litellm.text_completion(model="text-completion-openai/M", prompt="hello", max_tokens=5, temperature=0, **ABOUT)
vectors = litellm.embedding(model="openai/M", input=["a", "b"], **ABOUT)
try:
    litellm.completion(**(CHAT | {"max_tokens": 10**6}), **ABOUT)
    refused = None
except litellm.BadRequestError as error:
    refused = str(error)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(c.choices[0].delta.content or "" for c in streamed if c.choices),
            "tokens": whole.usage.completion_tokens,
            "streamed_tokens": max(
                getattr(c, "usage", None).completion_tokens for c in streamed if getattr(c, "usage", None)
            ),
            "call": called.choices[0].message.tool_calls[0].function.name,
            "arguments": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
            "text_tokens": text.usage.completion_tokens,
            "vectors": [len(row["embedding"]) for row in vectors.data],
            "refused": refused,
        }
    )
)
