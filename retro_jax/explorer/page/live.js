"use strict";
// What a page with a server behind it can do: generate, rescore, keep the session in the address.

(() => {
  const {byId, state} = explorer;
  const FIELDS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"];
  let working = null; // AbortController of the request in progress

  // Requests

  function say(message, isError = false) {
    byId("status").textContent = message;
    byId("status").classList.toggle("error", isError);
  }

  async function post(path, session, signal) {
    const response = await fetch(path, {
      method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(session), signal,
    });
    if (response.ok) return response;
    throw new Error(await response.json().then((body) => body.error, () => `the server answered ${response.status}`));
  }

  /** Runs one piece of work at a time; tells what goes wrong. Gives whether it came to its end. */
  async function work(message, task) {
    if (working) return false;
    working = new AbortController();
    say(message);
    setBusy(true);
    try {
      await task(working.signal);
      say("");
      return true;
    } catch (error) {
      if (error.name === "AbortError") say("Stopped.");
      else say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);
      return false;
    } finally {
      working = null;
      setBusy(false);
    }
  }

  function setBusy(busy) {
    byId("stop").hidden = !busy;
    byId("result").setAttribute("aria-busy", busy);
    for (const button of document.querySelectorAll("#generate, #look, .pane button, #result .actions button")) {
      button.disabled = busy;
    }
  }

  // The session

  function asked() {
    const decoding = Object.fromEntries(FIELDS.map((name) => [name, byId(name).valueAsNumber]));
    return {prompt: byId("prompt").value, max_new_tokens: byId("max_new_tokens").valueAsNumber, decoding};
  }

  function fill(session) {
    byId("prompt").value = session.prompt;
    if (session.max_new_tokens) byId("max_new_tokens").value = session.max_new_tokens;
    for (const name of FIELDS) byId(name).value = session.decoding[name];
  }

  function show(view) {
    explorer.show(view);
    const {session} = view;
    byId("undo").hidden = session.edits.length === 0;
    for (const mode of ["on", "off"]) {
      byId(`show-${mode}`).hidden = session.shown === mode || session[mode].length === 0;
    }
    remember();
  }

  async function look(message, session) {
    return work(message, async (signal) => show(await (await post("api/view", session, signal)).json()));
  }

  async function generate() {
    const session = {...asked(), on: [], off: []};
    byId("result").hidden = true;
    byId("continuations").hidden = false;
    explorer.showPrompt(session.prompt);
    for (const mode of ["on", "off"]) {
      byId(`text-${mode}`).textContent = "";
      byId(`show-${mode}`).hidden = true;
    }
    let view = null;
    const done = await work("Generating… (the first text of a length takes longer: programs are compiled)", async (signal) => {
      const response = await post("api/generate", {...session, on: [], off: []}, signal);
      for await (const event of lines(response.body)) {
        if (event.error) throw new Error(event.error);
        if (event.view) view = event.view;
        else {
          const text = byId(`text-${event.mode}`);
          text.append(event.text);
          text.parentElement.scrollTop = text.parentElement.scrollHeight;
          session[event.mode].push(...event.tokens);
        }
      }
      if (!view) throw new Error("the server broke off");
    });
    if (view) show(view);
    else if (session.on.length + session.off.length && !done) await lookAtPart(session);
    else byId("continuations").hidden = true;
  }

  /** After a stop: what has come so far. */
  async function lookAtPart(session) {
    const message = byId("status").textContent;
    const isError = byId("status").classList.contains("error");
    await look("Scoring what has come so far…", session);
    say(message, isError);
  }

  async function* lines(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      const parts = (held + value).split("\n");
      held = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  /** Another neighbour: null drops it, undefined brings the retrieved one back. */
  async function edit(chunk, rank, text) {
    const {session} = state.view;
    const edits = session.edits.filter((other) => other.chunk !== chunk || other.rank !== rank);
    if (text !== undefined) edits.push({chunk, rank, text});
    await look("Rescoring…", {...session, edits});
    document.querySelector(`[data-key="${chunk}-${rank}"] button`)?.focus();
  }

  // The address

  function encode(value) {
    const bytes = new TextEncoder().encode(JSON.stringify(value));
    let binary = "";
    for (const byte of bytes) binary += String.fromCharCode(byte);
    return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  }

  function decode(text) {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (character) => character.charCodeAt(0))));
  }

  function remember() {
    history.replaceState(null, "", `#${encode({session: state.view.session, colour: state.colour})}`);
  }

  async function restore() {
    if (location.hash.length < 2) return;
    let kept;
    try {
      kept = decode(location.hash.slice(1));
      fill(kept.session);
    } catch {
      say("This link is damaged: it holds no session.", true);
      return;
    }
    explorer.setColour(kept.colour === "run" ? "run" : "loss");
    await look("Restoring the session of this link…", kept.session);
  }

  // Start

  async function start() {
    const about = await (await fetch("api/about")).json();
    explorer.describeRun(about.run);
    fill(about.session);
    byId("max_new_tokens").max = about.limits.new_tokens;
    byId("limits").textContent =
      `at most ${about.limits.prompt_tokens} tokens of prompt and ${about.limits.new_tokens} new ones`;
    for (const id of ["ask", "link", "save-page"]) byId(id).hidden = false;
    await restore();
  }

  state.actions = {edit, coloured: () => state.view && remember()};
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("look").addEventListener("click", () => {
    if (byId("ask").reportValidity()) look("Scoring…", {...asked(), max_new_tokens: 0});
  });
  byId("stop").addEventListener("click", () => working?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
  for (const mode of ["on", "off"]) {
    byId(`show-${mode}`).addEventListener("click", () =>
      look("Scoring…", {...state.view.session, shown: mode, edits: []}));
  }
  byId("undo").addEventListener("click", () => look("Rescoring…", {...state.view.session, edits: []}));
  byId("link").addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    say("The link holds the whole session; it opens in any explorer of this run.");
  });
  byId("save-page").addEventListener("click", () => work("Saving…", async (signal) =>
    explorer.save(await (await post("api/page", state.view.session, signal)).text(), "text/html", "retro-session.html")));
  addEventListener("hashchange", restore);
  start().catch(() => say("The server does not answer; is it still running?", true));
})();
