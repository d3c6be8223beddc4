// The page at /: asks one server the same under the router's mix, the shared expert and one expert, side by side.

const by = (id) => document.getElementById(id);
const state = { key: "", version: null, picture: "", stop: null };

function tell(message) {
  by("fault").textContent = message;
  by("fault").hidden = !message;
}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.status === 401) by("unlock").hidden = false;
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered with status ${answer.status}`);
  }
  return answer;
}

async function begin() {
  try {
    state.version = await (await call("/version")).json();
  } catch (error) {
    tell(error.message);
    return;
  }
  tell("");
  by("unlock").hidden = true;
  const { model, experts, reads, answers, routes } = state.version;
  by("name").textContent = model;
  document.title = `${model} · twinmerge`;
  for (const name of ["length-label", "heat-label"]) by(name).hidden = answers !== "continuation";
  for (const name of ["picture", "picture-label"]) by(name).hidden = reads !== "images";
  for (const name of ["text", "text-label"]) by(name).hidden = reads === "images";
  by("expert").replaceChildren(...experts.map((name) => new Option(name)));
  by("gate").replaceChildren(...experts.map(gateRow));
  if (!routes) {
    by("by-hand").checked = true;
    by("by-hand").disabled = true;
  }
  byHand();
}

function gateRow(name, index) {
  const row = document.createElement("div");
  const label = document.createElement("label");
  const bar = document.createElement("progress");
  const slider = document.createElement("input");
  const value = document.createElement("output");
  label.textContent = name;
  label.id = `gate-${index}`;
  Object.assign(bar, { max: 1, value: 0 });
  Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.01, value: 0 });
  for (const one of [bar, slider]) one.setAttribute("aria-labelledby", label.id);
  slider.addEventListener("input", () => show(row, Number(slider.value)));
  row.dataset.expert = name;
  row.append(label, bar, slider, value);
  show(row, 0);
  return row;
}

function show(row, weight) {
  row.querySelector("progress").value = Math.max(0, Math.min(1, weight));
  row.querySelector("input").value = weight;
  row.querySelector("output").textContent = weight.toFixed(2);
}

function byHand() {
  const chosen = by("by-hand").checked;
  for (const row of by("gate").children) {
    row.querySelector("progress").hidden = chosen;
    row.querySelector("input").hidden = !chosen;
  }
  by("mixed-title").textContent = chosen ? "Mixed by hand" : "Mixed by the router";
}

function gateByHand() {
  return Object.fromEntries([...by("gate").children].map((row) => [row.dataset.expert, Number(row.querySelector("input").value)]));
}

function used(twin) {
  for (const row of by("gate").children) show(row, twin.gate[row.dataset.expert] ?? 0);
  const sure = twin.confidence === null || twin.confidence === undefined ? "" : `, ${(100 * twin.confidence).toFixed(1)} % sure`;
  const left = twin.fallback ? ": unlike every expert's inputs, left to the shared expert" : "";
  by("route").textContent = twin.expert ? `${twin.expert}${sure}${left}` : "the shared expert";
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write(place, body, signal) {
  const began = performance.now();
  let first = null;
  let tokens = 0;
  const asked = { stream: true, stream_options: { include_usage: true }, max_tokens: Number(by("length").value), temperature: Number(by("heat").value) };
  const answer = await call("/v1/completions", { prompt: by("text").value, ...asked, ...body }, signal);
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.choices.length && first === null) {
      first = performance.now() - began;
      if (place === "mixed") used(event.twin);
    }
    if (event.choices.length) by(place).textContent += event.choices[0].text;
    if (event.usage) tokens = event.usage.completion_tokens;
  }
  const all = performance.now() - began;
  by(`${place}-time`).textContent = `${tokens} tokens, the first after ${first?.toFixed(0) ?? "–"} ms, all after ${all.toFixed(0)} ms`;
}

async function label(place, body, signal) {
  const began = performance.now();
  const embeds = state.version.answers === "embedding";
  const path = embeds ? "/v1/embeddings" : "/classify";
  const answer = await call(path, { input: state.version.reads === "images" ? state.picture : by("text").value, ...body }, signal);
  const found = (await answer.json()).data[0];
  const own = embeds ? found.twin : found;
  if (place === "mixed") used(own);
  by(place).textContent = embeds ? `${found.embedding.length} numbers, the first ${found.embedding.slice(0, 4).map((one) => one.toFixed(4)).join(", ")}` : said(found);
  by(`${place}-time`).textContent = `after ${(performance.now() - began).toFixed(0)} ms`;
}

function said(found) {
  const hidden = new Set(["index", "expert", "gate", "fallback", "confidence", "second"]);
  const rest = Object.entries(found).filter(([name]) => !hidden.has(name));
  return rest.map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n");
}

async function ask(event) {
  event.preventDefault();
  if (!state.version || by("send").disabled) return;
  const { model, answers, heads } = state.version;
  const expert = by("expert").value;
  const run = answers === "continuation" ? write : label;
  tell("");
  by("alone-title").textContent = `Expert ${expert}`;
  for (const place of ["mixed", "shared", "alone"]) {
    by(place).textContent = "";
    by(`${place}-time`).textContent = "";
  }
  state.stop = new AbortController();
  by("send").disabled = true;
  by("end").disabled = false;
  const mixed = by("by-hand").checked ? { model, twin: { gate: gateByHand(), ...(heads ? { expert } : {}) } } : { model };
  const shared = { model: `${model}:shared`, ...(heads ? { twin: { expert } } : {}) };
  const { signal } = state.stop;
  const done = await Promise.allSettled([run("mixed", mixed, signal), run("shared", shared, signal), run("alone", { model: `${model}:${expert}` }, signal)]);
  const failed = done.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
  if (failed) tell(failed.reason.message);
  by("send").disabled = false;
  by("end").disabled = true;
}

by("ask").addEventListener("submit", ask);
by("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("ask").requestSubmit();
});
by("end").addEventListener("click", () => state.stop?.abort());
by("by-hand").addEventListener("change", byHand);
by("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = by("key").value;
  begin();
});
by("picture").addEventListener("change", () => {
  const [file] = by("picture").files;
  if (!file) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    state.picture = reader.result;
  });
  reader.readAsDataURL(file);
});
begin();
