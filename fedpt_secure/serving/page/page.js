"use strict";

const $ = (id) => document.getElementById(id);
const NAMES = { large: "large model alone", small: "small model", proxied: "steered model" };
let running = null; // the AbortController of the comparison in progress
let lastRequest = null; // what the slider asks again

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function panel(arm) {
  return document.querySelector(`[data-arm="${arm}"] .answer`);
}

async function problem(response) {
  if (response.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function describeRun() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      say(await problem(response), response.status !== 401);
      return;
    }
    const run = (await response.json()).data[0];
    $("about").textContent = `Run ${run.id}: the large model alone, the small model that was tuned privately, and the large model steered by it.`;
    if (run.large_model_at) $("about").textContent += ` Prompts and answers are sent to ${run.large_model_at}.`;
    $("alpha").value = Math.min(2, run.alpha);
    if (run.shares.length) {
      $("alpha-help").textContent =
        "0 is the large model alone; the small model's own share moves along. Moving it answers the same prompt again.";
    }
    showAlpha();
    $("chat").disabled = !run.chat;
    const statement = await fetch("v1/privacy", { headers: headers() });
    $("privacy").textContent = statement.ok ? privacySentence(await statement.json()) : "This run has no privacy statement.";
  } catch {
    say("The server cannot be reached.", true);
  }
}

function privacySentence(statement) {
  if (!statement.private) return "This run is NOT PRIVATE: it promises nothing about its training records.";
  const claim = typeof statement.claim === "string" ? statement.claim : "";
  return `Privacy of the training records: ${claim || `epsilon at most ${statement.epsilon} at delta ${statement.delta}`}`;
}

function showAlpha() {
  const value = Number($("alpha").value).toFixed(2);
  $("alpha-value").textContent = value;
}

function level(token) {
  if (token.shift === undefined) return 2;
  return token.shift < 0.5 ? 1 : token.shift < 1 ? 2 : token.shift < 2 ? 3 : 4;
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : "under 0.1 %";
}

function shown(text) {
  return text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
}

function explanation(token) {
  const other = `The large model alone would have said \u201c${shown(token.large_token)}\u201d here, not \u201c${shown(token.text)}\u201d.`;
  if (token.shift === undefined) return other;
  return `${other} Chance of \u201c${shown(token.text)}\u201d: ${percent(token.large_logprob)} alone, ${percent(token.logprob)} steered.`;
}

// A delta's tokens as elements; characters that several tokens spell are kept in one element.
function elements(delta) {
  const whole = delta.tokens.map((token) => token.text).join("") === delta.text;
  const parts = whole ? delta.tokens : [{ ...(delta.tokens.find((token) => token.changed) ?? {}), text: delta.text }];
  return parts.map((token) => {
    const element = document.createElement("span");
    element.className = "token";
    element.textContent = token.text;
    if (token.changed) {
      element.classList.add("changed", `level${level(token)}`);
      if (!token.text.trim()) element.textContent = shown(token.text) + token.text; // a mark needs something to stand on
      element.title = explanation(token);
      element.dataset.explanation = element.title;
      element.setAttribute("role", "img");
      element.setAttribute("aria-label", `${shown(token.text)}, changed. ${element.title}`);
      element.tabIndex = panel("proxied").querySelector("[tabindex='0']") ? -1 : 0;
    }
    return element;
  });
}

function grow(delta) {
  const place = panel(delta.arm);
  if (delta.arm !== "proxied") {
    place.append(delta.text);
  } else {
    for (const element of elements(delta)) place.append(element);
  }
}

async function readEvents(response, onEvent) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) onEvent(JSON.parse(event.replace(/^data: /, "")));
  }
}

async function compare(request) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  $("stop").disabled = false;
  $("detail").textContent = "";
  const started = performance.now();
  for (const arm of request.arms) {
    const place = panel(arm);
    place.replaceChildren();
    place.setAttribute("aria-busy", "true");
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = request.chat ? "" : request.prompt;
    place.append(given);
  }
  say("Answering ...");
  try {
    const response = await fetch("v1/compare", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(request),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    let failure = "";
    await readEvents(response, (event) => {
      if (event.error) failure = event.error.message;
      else if (running === mine) grow(event);
    });
    if (failure) throw new Error(failure);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    if (running === mine) say(`${summary()} ${seconds} s.`);
  } catch (error) {
    if (running !== mine) return; // a newer comparison took over
    if (error.name === "AbortError") say("Stopped.");
    else say(`No answer: ${error.message}`, true);
  } finally {
    if (running === mine) {
      running = null;
      $("stop").disabled = true;
      for (const arm of Object.keys(NAMES)) panel(arm).removeAttribute("aria-busy");
    }
  }
}

function summary() {
  const all = panel("proxied").querySelectorAll(".token").length;
  const changed = panel("proxied").querySelectorAll(".changed").length;
  return `Done: tuning changed ${changed} of ${all} tokens of the steered answer.`;
}

function wanted(arms) {
  return {
    prompt: $("prompt").value,
    chat: $("chat").checked && !$("chat").disabled,
    arms,
    alpha: Number($("alpha").value),
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
  };
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  lastRequest = wanted(["large", "small", "proxied"]);
  compare(lastRequest);
});
$("stop").addEventListener("click", () => running?.abort());
$("alpha").addEventListener("input", showAlpha);
$("alpha").addEventListener("change", () => {
  if (lastRequest === null) return;
  // A comparison that is not complete is begun anew; else only the steered answer depends on alpha.
  const arms = running ? lastRequest.arms : ["proxied"];
  lastRequest = { ...lastRequest, arms, alpha: Number($("alpha").value) };
  compare(lastRequest);
});
$("key").addEventListener("change", describeRun);

// Arrow keys move between changed tokens; one of them is in the tab order.
panel("proxied").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const changed = [...panel("proxied").querySelectorAll(".changed")];
  const at = changed.indexOf(document.activeElement);
  if (!step || at < 0) return;
  event.preventDefault();
  const next = changed[Math.min(changed.length - 1, Math.max(0, at + step))];
  changed[at].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
for (const kind of ["focusin", "click"]) {
  panel("proxied").addEventListener(kind, (event) => {
    const text = event.target.dataset?.explanation;
    if (text) $("detail").textContent = text;
  });
}

showAlpha();
describeRun();
