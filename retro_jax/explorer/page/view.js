"use strict";
// Shows a view, the JSON of `Explorer.view`. What comes from documents, prompts and models is set as text, never as
// markup. live.js puts its actions into `explorer.actions`; without them nothing can be changed.

const explorer = (() => {
  const CLIP = 0.5; // nats; as in the paper's figures
  const STEPS = 5; // classes of colour on each side of 0, and lengths of runs
  const PROMPT_END = 100; // characters
  const NAMES = {on: "RETRO[ON]", off: "RETRO[OFF]"};
  const state = {view: null, colour: "loss", actions: null};

  const byId = (id) => document.getElementById(id);

  /** An element with attributes; children are elements or text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const figure = (value) => (value === null ? "–" : value.toFixed(3));
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

  // Colours

  /** Class of a difference of losses: l-5 to l5. Positive: retrieval helps. */
  function lossClass(difference) {
    const size = Math.min(Math.round((Math.abs(difference) / CLIP) * STEPS), STEPS);
    return `l${difference < 0 && size ? "-" : ""}${size}`;
  }

  const runClass = (run) => `r${Math.min(run, STEPS)}`;

  function colourOf(token) {
    return state.colour === "loss" ? lossClass(token.off - token.on) : runClass(token.run);
  }

  function legend() {
    const swatches = (classes) => make("span", {class: "swatches"}, ...classes.map((name) => make("i", {class: name})));
    const steps = [...Array(2 * STEPS + 1).keys()].map((step) => `l${step - STEPS}`);
    const both = state.colour === "loss";
    const loss = make("p", {}, "Text: hurts −0.5", swatches(steps), "+0.5 nats, helps");
    const run = make(
      "p", {}, `${both ? "Neighbours" : "Text and neighbours"}: 0`, swatches([...Array(STEPS + 1).keys()].map(runClass)),
      `≥${STEPS} tokens in common`);
    byId("legend").replaceChildren(...(both ? [loss, run] : [run]));
  }

  // Tokens

  function tokenElement(token, name) {
    const lines = token.text.includes("\n") ? " line" : "";
    const empty = token.text === "" ? " part" : ""; // a part of a character that a later token completes
    return make("span", {class: `token ${name}${lines}${empty}`}, token.text);
  }

  function describe(token) {
    const gain = token.off - token.on;
    const effect = Math.abs(gain) < 0.005 ? "no difference" : `retrieval ${gain > 0 ? "helps" : "hurts"} ${signed(gain)}`;
    const run = token.run ? `, match of ${token.run}` : "";
    return `${JSON.stringify(token.text)}  OFF ${token.off.toFixed(2)}  ON ${token.on.toFixed(2)} nats: ${effect}${run}`;
  }

  function clearMarks() {
    for (const element of document.querySelectorAll(".match")) element.classList.remove("match");
  }

  /** Tells of a token, and marks the run that ends with it in its chunk and in the neighbours. */
  function point(list, place) {
    const [tokens, elements] = [list.tokens, list.elements];
    clearMarks();
    const readout = byId("readout");
    readout.textContent = describe(tokens[place]);
    readout.hidden = false;
    const length = tokens[place].run;
    if (!length) return;
    const run = tokens.slice(place - length + 1, place + 1).map((token) => token.text);
    elements.slice(place - length + 1, place + 1).forEach((element) => element.classList.add("match"));
    for (const card of list.cards) {
      const spans = [...card.querySelectorAll(".token")];
      for (let first = 0; first + length <= spans.length; first++) {
        if (run.every((text, index) => spans[first + index].textContent === text)) {
          spans.slice(first, first + length).forEach((element) => element.classList.add("match"));
        }
      }
    }
  }

  function leave() {
    clearMarks();
    byId("readout").hidden = true;
  }

  /** The text of a chunk: one stop of the Tab key, arrow keys inside. */
  function chunkText(chunk, view, cards) {
    const tokens = view.tokens.slice(chunk.first, chunk.end);
    const elements = tokens.map((token) => tokenElement(token, colourOf(token)));
    const list = {tokens, elements, cards};
    const text = make("p", {class: "text", role: "group", "aria-label": `Text of chunk ${chunk.number}`}, ...elements);
    elements.forEach((element, place) => {
      element.tabIndex = place ? -1 : 0;
      if (chunk.first + place === view.prompt_tokens) {
        element.classList.add("begins");
        element.title = "Here the prompt ends and the continuation begins";
      }
      element.addEventListener("mouseenter", () => point(list, place));
      element.addEventListener("focus", () => {
        for (const other of elements) other.tabIndex = -1;
        element.tabIndex = 0;
        point(list, place);
      });
      element.addEventListener("blur", leave);
      element.addEventListener("click", () => element.focus());
    });
    text.addEventListener("mouseleave", leave);
    text.addEventListener("keydown", (event) => {
      const place = elements.indexOf(event.target);
      const to = {
        ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1,
        Home: 0, End: elements.length - 1,
      }[event.key];
      if (event.key === "Escape") event.target.blur();
      if (to === undefined || !elements[to]) return;
      event.preventDefault();
      elements[to].focus();
    });
    return text;
  }

  // Neighbours

  const WORDS = {retrieved: "", dropped: "dropped", typed: "typed in", none: "none found"};

  function card(slot, chunk) {
    const source = slot.title || slot.document;
    const head = make(
      "header", {},
      make("span", {class: "rank", "aria-label": `Rank ${slot.rank}`}, String(slot.rank)),
      make("span", {class: "source"}, source || (slot.state === "typed" ? "Your own" : "No neighbour")),
      WORDS[slot.state] ? make("span", {class: "badge"}, WORDS[slot.state]) : null,
      slot.distance === null ? null : make("span", {class: "soft"}, `distance ${slot.distance.toFixed(3)}`),
    );
    const document_ = slot.title && slot.document ? make("p", {class: "document soft"}, slot.document) : null;
    const part = (name, label) => slot[name].length === 0 ? null : make(
      "p", {class: `text ${name}`}, make("span", {class: "label"}, label),
      ...slot[name].map((token) => tokenElement(token, runClass(token.run))));
    const element = make(
      "article", {
        class: `card ${slot.state}`, "data-key": `${chunk}-${slot.rank}`,
        "aria-label": `Neighbour ${slot.rank} of chunk ${chunk}${source ? `, from ${source}` : ""}`,
      },
      head, document_,
      make("div", {class: "parts"}, part("neighbour", "Neighbour"), part("continuation", "Continuation")),
      slot.cut ? make("p", {class: "soft"}, `${slot.cut} tokens at the end are cut off: the model reads no more.`) : null,
    );
    if (state.actions) element.append(buttons(slot, chunk, element));
    return element;
  }

  function buttons(slot, chunk, element) {
    const edit = state.actions.edit;
    const button = (label, action) => make(
      "button", {type: "button", onclick: action, "aria-label": `${label} neighbour ${slot.rank} of chunk ${chunk}`}, label);
    const row = make("div", {class: "actions"});
    if (slot.state === "retrieved") row.append(button("Drop", () => edit(chunk, slot.rank, null)));
    if (slot.state === "dropped" || slot.state === "typed") {
      row.append(button("Restore", () => edit(chunk, slot.rank, undefined)));
    }
    row.append(button(slot.state === "typed" ? "Change…" : "Replace…", () => {
      const field = make("textarea", {rows: 4, "aria-label": `Text to read as neighbour ${slot.rank} of chunk ${chunk}`});
      field.value = slot.typed ?? [...slot.neighbour, ...slot.continuation].map((token) => token.text).join("");
      const close = () => { editor.replaceWith(row); row.lastChild.focus(); };
      const editor = make(
        "form", {
          class: "editor",
          onsubmit: (event) => { event.preventDefault(); edit(chunk, slot.rank, field.value); },
          onkeydown: (event) => {
            if (event.key === "Escape") close();
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.requestSubmit();
          },
        },
        field,
        make("div", {class: "actions"},
          make("button", {class: "primary"}, "Rescore"), make("button", {type: "button", onclick: close}, "Cancel")),
      );
      row.replaceWith(editor);
      field.select();
    }));
    return row;
  }

  // Figures

  /** What retrieval saves or costs, in words; `costs` in bits per byte. */
  function effect(costs) {
    if (costs.on === null) return null;
    const gain = costs.off - costs.on;
    const [name, word] = Math.abs(gain) < 0.0005 ? ["l0", "no difference"] :
      gain > 0 ? ["l3", `saves ${gain.toFixed(3)}`] : ["l-3", `costs ${(-gain).toFixed(3)}`];
    return make("span", {class: `effect ${name}`}, word);
  }

  const edited = (costs) => costs.on !== null && Math.abs(costs.on - costs.as_retrieved) >= 0.0005;

  function total(view) {
    const costs = view.total.bits_per_byte;
    const entry = (name, value, more) => make(
      "div", {}, make("dt", {}, name), make("dd", {}, make("span", {class: "value"}, value), more));
    byId("total").replaceChildren(
      entry("OFF, bits/byte", figure(costs.off), null),
      entry("ON, bits/byte", figure(costs.on), edited(costs) ? make("small", {}, `${figure(costs.as_retrieved)} as retrieved`) : null),
      entry("Retrieval", "", effect(costs)),
      entry("Text", view.tokens.length.toLocaleString("en"), make("small", {}, `tokens, ${view.total.bytes.toLocaleString("en")} bytes`)),
    );
  }

  /** A bar for each chunk: up where retrieval saves bits, down where it costs some. */
  function overview(view) {
    const gains = view.chunks.map((chunk) => {
      const costs = chunk.bits_per_byte;
      return costs.on === null ? 0 : costs.off - costs.on;
    });
    const largest = Math.max(...gains.map(Math.abs), 1e-3);
    byId("overview").replaceChildren(...view.chunks.map((chunk, index) => {
      const bar = make("i", {class: gains[index] >= 0 ? "up" : "down"});
      bar.style.setProperty("--size", Math.abs(gains[index]) / largest);
      const costs = chunk.bits_per_byte;
      const label = `Chunk ${chunk.number}: OFF ${figure(costs.off)}, ON ${figure(costs.on)} bits per byte`;
      return make("a", {
        href: `#chunk-${chunk.number}`, title: label, "aria-label": label,
        onclick: (event) => {
          event.preventDefault(); // the address holds the session
          byId(`chunk-${chunk.number}`).scrollIntoView();
          byId(`chunk-${chunk.number}`).querySelector(".token").focus({preventScroll: true});
        },
      }, bar, make("span", {}, String(chunk.number)));
    }));
  }

  function chunkElement(chunk, view) {
    const costs = chunk.bits_per_byte;
    const cards = chunk.reads ? chunk.reads.neighbours.map((slot) => card(slot, chunk.reads.chunk)) : [];
    const figures = make(
      "p", {class: "figures"}, `OFF ${figure(costs.off)}  ON ${figure(costs.on)}`,
      edited(costs) ? make("span", {class: "soft"}, ` (${figure(costs.as_retrieved)} as retrieved)`) : null,
      make("span", {class: "soft"}, " bits/byte "), effect(costs));
    const beside = chunk.reads === null ? [make("p", {class: "soft"}, "The first chunk reads no neighbours.")] : [
      make("h4", {}, "Read here ", make("span", {class: "soft"}, `found by chunk ${chunk.reads.chunk}`)),
      chunk.reads.failure ? make("p", {class: "notice"}, `Went on without neighbours: ${chunk.reads.failure}`) : null,
      ...cards,
    ].filter((child) => child !== null);
    return make(
      "li", {id: `chunk-${chunk.number}`, class: "chunk"},
      make("div", {class: "own"},
        make("header", {}, make("h3", {}, `Chunk ${chunk.number}`), figures), chunkText(chunk, view, cards)),
      make("div", {class: "read"}, ...beside));
  }

  // The page

  function describeRun(run) {
    byId("run").textContent =
      `${run.workdir}, step ${run.step} · ${run.neighbours} ${run.neighbours === 1 ? "neighbour" : "neighbours"} ` +
      `for each chunk of ${run.chunk_length} tokens, from ${run.database}`;
  }

  /** The end of the prompt, before both continuations. */
  function showPrompt(prompt) {
    const characters = [...prompt];
    const end = characters.length > PROMPT_END ? "…" + characters.slice(-PROMPT_END).join("") : prompt;
    for (const element of document.querySelectorAll("[data-prompt]")) element.textContent = end;
  }

  function continuations(view) {
    const {session, texts} = view;
    const any = session.on.length + session.off.length > 0;
    byId("continuations").hidden = !any;
    showPrompt(session.prompt);
    for (const mode of ["on", "off"]) {
      byId(`text-${mode}`).textContent = texts[mode];
      byId(`text-${mode}`).parentElement.scrollTop = 0;
      byId(`text-${mode}`).closest(".pane").classList.toggle("shown", session.shown === mode);
    }
    byId("result-title").textContent =
      any ? `What retrieval changes in the text of ${NAMES[session.shown]}` : "What retrieval changes in this text";
  }

  function show(view) {
    state.view = view;
    leave();
    describeRun(view.run);
    continuations(view);
    total(view);
    overview(view);
    legend();
    byId("chunks").replaceChildren(...view.chunks.map((chunk) => chunkElement(chunk, view)));
    byId("result").hidden = false;
  }

  function setColour(colour) {
    state.colour = colour;
    document.querySelector(`[name=colour][value=${colour}]`).checked = true;
    if (state.view) show(state.view);
  }

  function save(content, type, name) {
    const address = URL.createObjectURL(new Blob([content], {type}));
    make("a", {href: address, download: name}).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000); // the download has begun by then
  }

  for (const choice of document.querySelectorAll("[name=colour]")) {
    choice.addEventListener("change", () => {
      setColour(choice.value);
      state.actions?.coloured();
    });
  }
  byId("save-json").addEventListener("click", () =>
    save(JSON.stringify(state.view, null, 1), "application/json", "retro-session.json"));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") leave(); });

  return {state, byId, show, showPrompt, setColour, describeRun, save};
})();

if (document.getElementById("view")) explorer.show(JSON.parse(document.getElementById("view").textContent));
