"use strict";

const $ = (id) => document.getElementById(id);
const LOOK_EVERY_MS = 1000;
let messages = [];
let running = null; // what stops the answer under way
let model = "";
let before = null; // the counters of the last look

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function add(kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  $("chat").append(element);
  toEnd();
  return element;
}

function toEnd() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

// Who has scrolled up to read is not pulled down by what is still coming.
function isAtEnd() {
  const chat = $("chat");
  return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
}

async function findModel() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) throw new Error("This server wants an API key: it goes under Parameters.");
  if (!answer.ok) throw new Error(`The server answers ${answer.status}.`);
  const card = (await answer.json()).data[0];
  model = card.id;
  $("model").textContent = `${model}, ${card.max_model_len} tokens`;
  showAbilities(card.input_modalities || ["text"]);
}

function showAbilities(modalities) {
  $("with-picture").hidden = !modalities.includes("image");
}

function readPicture(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

// What is said: text alone, or with the picture that was chosen.
async function said(prompt) {
  const file = $("with-picture").hidden ? null : $("picture").files[0];
  if (!file) return { content: prompt, url: null };
  const url = await readPicture(file);
  return { content: [{ type: "text", text: prompt }, { type: "image_url", image_url: { url } }], url };
}

function request() {
  const system = $("system").value.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    max_completion_tokens: Number($("max_tokens").value),
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function ask(prompt) {
  if (!model) await findModel();
  const { content: asked, url } = await said(prompt);
  messages.push({ role: "user", content: asked });
  const question = add("said user", prompt);
  if (url) {
    const image = document.createElement("img");
    image.alt = "the picture that was sent";
    image.src = url;
    question.append(image);
  }
  const thought = add("thought", "");
  const shown = add("said assistant", "");
  const about = add("about", "");
  running = new AbortController();
  const began = performance.now();
  let first = 0;
  let usage = null;
  let content = "";
  let reason = "stopped";
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      const follows = isAtEnd();
      usage = event.usage || usage;
      for (const choice of event.choices) {
        const added = choice.delta.content || "";
        if (!first && (added || choice.delta.reasoning_content)) first = performance.now();
        content += added;
        shown.textContent = content;
        thought.textContent += choice.delta.reasoning_content || "";
        reason = choice.finish_reason || reason;
      }
      if (follows) toEnd();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "failed";
      throw error;
    }
  } finally {
    running = null;
    // A question without an answer is not asked again with the next one.
    if (content) messages.push({ role: "assistant", content });
    else messages.pop();
    $("picture").value = "";
    about.textContent = described(began, first, usage, reason);
    if (isAtEnd()) toEnd();
  }
}

function described(began, first, usage, reason) {
  const seconds = (performance.now() - (first || began)) / 1000;
  const words = [reason];
  if (usage) words.push(`${usage.completion_tokens} tokens`, `${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`);
  if (first) words.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  return words.join(", ");
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || running) return;
  $("prompt").value = "";
  $("stop").disabled = false;
  $("send").disabled = true;
  say("answering");
  try {
    await ask(prompt);
    say("");
  } catch (error) {
    say(error.message, true);
  }
  $("stop").disabled = true;
  $("send").disabled = false;
  $("prompt").focus();
}

function stop() {
  if (running) running.abort();
}

async function look() {
  const answer = await fetch("metrics", { headers: headers() });
  if (!answer.ok) return;
  const found = {};
  for (const line of (await answer.text()).split("\n")) {
    const match = /^servekit:([a-z_]+)\{[^}]*\} (\S+)$/.exec(line);
    if (match) found[match[1]] = (found[match[1]] || 0) + Number(match[2]);
  }
  $("running").textContent = found.num_requests_running;
  $("waiting").textContent = found.num_requests_waiting;
  $("kv").value = found.kv_cache_usage_perc;
  $("kv-text").textContent = `${(100 * found.kv_cache_usage_perc).toFixed(1)} %`;
  const now = { at: performance.now(), tokens: found.generation_tokens_total };
  const asked = found.prefix_cache_queries_total;
  $("hits").textContent = asked ? `${((100 * found.prefix_cache_hits_total) / asked).toFixed(1)} %` : "–";
  if (before) $("rate").textContent = Math.max(0, ((now.tokens - before.tokens) / (now.at - before.at)) * 1000).toFixed(1);
  before = now;
}

async function watch() {
  for (;;) {
    if (!document.hidden) await look().catch(() => {});
    await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
  }
}

function begin() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", () => {
    stop();
    messages = [];
    $("chat").replaceChildren();
    $("prompt").focus();
  });
  $("key").addEventListener("change", () => findModel().then(() => say(""), (error) => say(error.message, true)));
  findModel().catch((error) => say(error.message, true));
  watch();
}

begin();
