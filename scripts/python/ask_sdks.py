"""Asks a provider through the official clients, and reads its answers with their types, strictly.

stdin: a JSON list of questions: api, base, key, model, system, user, max_tokens, context, schema (or null), json (whether JSON is
asked for); or, of decisions, input, ids, labels and asks (a text with "{}" for the id) in place of those from system on; or, of
embeddings, texts and dimensions.
stdout: a JSON list: for each question null, or what is wrong with the answer by the client's own type.

The request goes out as the client writes it, and the provider keeps it. A client's answer is read once more from its bytes, with
fields that its type does not know forbidden: the clients themselves let everything through.
"""

import json
import sys
from functools import cache

import httpx
import httpx2
from pydantic import TypeAdapter, ValidationError

TYPES = {}
last = {}


def keep(response):
    last["body"] = response.read()


# Clients that keep the last answer's bytes.
http, http2 = (of.Client(event_hooks={"response": [keep]}, trust_env=False, timeout=20) for of in (httpx, httpx2))


@cache
def openai(base, key):
    import openai
    from openai.types import Decision
    from openai.types.chat import ChatCompletion

    TYPES["openai"] = ChatCompletion
    TYPES["openai", "decisions"] = Decision
    return openai.OpenAI(base_url=base, api_key=key, http_client=http, max_retries=0)


@cache
def azure(base, key):
    import openai
    from openai.types.chat import ChatCompletion

    TYPES["azure"] = ChatCompletion
    return openai.AzureOpenAI(
        azure_endpoint=base.removesuffix("/openai"), api_key=key, api_version="2024-10-21", http_client=http, max_retries=0
    )


@cache
def anthropic(base, key):
    import anthropic
    from anthropic.types import Message

    TYPES["anthropic"] = Message
    return anthropic.Anthropic(base_url=base.removesuffix("/v1"), api_key=key, http_client=http2, max_retries=0)


@cache
def gemini(base, key):
    from google import genai
    from google.genai import decisions, types

    TYPES["gemini"] = types.GenerateContentResponse
    TYPES["gemini", "decisions"] = decisions.CreateDecisionResponse
    root, version = base.rsplit("/", 1)
    return genai.Client(api_key=key, http_options=types.HttpOptions(base_url=root, api_version=version, httpx_client=http))


@cache
def mistral(base, key):
    from mistralai.client import Mistral
    from mistralai.client.models import ChatCompletionResponse

    TYPES["mistral"] = ChatCompletionResponse
    return Mistral(api_key=key, server_url=base.removesuffix("/v1"), client=http)


@cache
def cohere(base, key):
    import cohere

    TYPES["cohere"] = cohere.V2ChatResponse
    return cohere.ClientV2(api_key=key, base_url=base.removesuffix("/v2"), httpx_client=http)


@cache
def ollama(base, key):
    import ollama

    TYPES["ollama"] = ollama.ChatResponse
    TYPES["ollama", "texts"] = ollama.EmbedResponse
    headers = {"authorization": f"Bearer {key}"}
    return ollama.Client(host=base, headers=headers, event_hooks={"response": [keep]}, trust_env=False, timeout=20)


@cache
def voyage(base, key):
    import voyageai

    return voyageai.Client(api_key=key, base_url=base, max_retries=0, timeout=20)


def messages(q):
    return [{"role": "system", "content": q["system"]}, {"role": "user", "content": q["user"]}]


def given(**all):
    return {name: value for name, value in all.items() if value is not None}


def openai_format(q):
    if q["schema"]:
        return {"type": "json_schema", "json_schema": {"name": "answers", "strict": True, "schema": q["schema"]}}
    return {"type": "json_object"} if q["json"] else None


def ask_openai(client, q):
    client.chat.completions.create(
        model=q["model"], messages=messages(q), max_tokens=q["max_tokens"], **given(response_format=openai_format(q))
    )


def ask_anthropic(client, q):
    config = {"format": {"type": "json_schema", "schema": q["schema"]}} if q["schema"] else None
    client.messages.create(
        model=q["model"], max_tokens=q["max_tokens"], system=[{"type": "text", "text": q["system"]}],
        messages=[{"role": "user", "content": q["user"]}], **given(output_config=config),
    )  # fmt: skip


def ask_gemini(client, q):
    from google.genai import types

    client.models.generate_content(
        model=q["model"], contents=q["user"],
        config=types.GenerateContentConfig(
            system_instruction=q["system"], max_output_tokens=q["max_tokens"],
            **given(response_mime_type="application/json" if q["json"] else None, response_json_schema=q["schema"]),
        ),
    )  # fmt: skip


def decide_openai(client, q):
    choices = [{"value": label} for label in q["labels"]]
    questions = [
        {"type": "choice", "name": str(n), "instructions": q["asks"].format(n), "choices": choices} for n in q["ids"]
    ]
    client.decisions.create(model=q["model"], input=q["input"], questions=questions)


def decide_gemini(client, q):
    criteria = dict.fromkeys(q["labels"], "")
    questions = {
        str(n): {"type": "choice", "instructions": q["asks"].format(n), "criteria": criteria} for n in q["ids"]
    }
    client.decisions.create(model=f"models/{q['model']}", input=q["input"], questions=questions)


def ask_mistral(client, q):
    client.chat.complete(
        model=q["model"], messages=messages(q), max_tokens=q["max_tokens"], **given(response_format=openai_format(q))
    )


def ask_cohere(client, q):
    form = {"type": "json_object", **given(json_schema=q["schema"])} if q["json"] else None
    client.chat(model=q["model"], messages=messages(q), max_tokens=q["max_tokens"], **given(response_format=form))


def ask_ollama(client, q):
    client.chat(
        model=q["model"], messages=messages(q), options={"num_ctx": q["context"], "num_predict": q["max_tokens"]},
        **given(format=q["schema"] or ("json" if q["json"] else None)),
    )  # fmt: skip


def embed_ollama(client, q):
    client.embed(model=q["model"], input=q["texts"], dimensions=q["dimensions"], truncate=False)


def embed_voyage(client, q):
    """The client has no type for the answer, so what it makes of it is looked at."""
    made = client.embed(q["texts"], model=q["model"], input_type="document", truncation=False, output_dimension=q["dimensions"])
    if [len(vector) for vector in made.embeddings] != [q["dimensions"]] * len(q["texts"]) or not made.total_tokens:
        raise ValueError(f"{made.embeddings} {made.total_tokens}")


ASK = {
    "openai": (openai, ask_openai), "azure": (azure, ask_openai), "anthropic": (anthropic, ask_anthropic),
    "gemini": (gemini, ask_gemini), "mistral": (mistral, ask_mistral), "cohere": (cohere, ask_cohere),
    "ollama": (ollama, ask_ollama), "voyage": (voyage, None),
}  # fmt: skip
DECIDE = {"openai": decide_openai, "gemini": decide_gemini}
EMBED = {"ollama": embed_ollama, "voyage": embed_voyage}


def wrong(q):
    client, ask = ASK[q["api"]]
    answer = q["api"]
    if "ids" in q:
        ask, answer = DECIDE[q["api"]], (q["api"], "decisions")
    if "texts" in q:
        ask, answer = EMBED[q["api"]], (q["api"], "texts")
    found = []
    try:
        ask(client(q["base"], q["key"]), q)
    except Exception as error:  # of any of the clients
        found.append(f"raised: {type(error).__name__} {error}")
    if q["api"] == "voyage":
        return found or None
    try:
        TypeAdapter(TYPES[answer]).validate_json(last.pop("body"), extra="forbid")
    except ValidationError as error:
        found += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return found or None


print(json.dumps([wrong(q) for q in json.load(sys.stdin)]))
