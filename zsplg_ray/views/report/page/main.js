// The controls, and the first picture of it all.

const root = document.documentElement;

function fillControls() {
  const options = [];
  for (const [key, { name }] of Object.entries(PAGE.measures)) {
    const ends = LOW_FIRST.has(key) ? ["+", "-"] : ["-", "+"];
    for (const end of ends) {
      const first = key === "doubt" ? (end === "-" ? "most doubtful" : "surest") : `${name}, ${end === "+" ? "low" : "high"}`;
      options.push([key + end, `${first} first`]);
    }
  }
  options.push(["id+", "name"], ["id-", "name, backwards"]);
  fillSelect(byId("sort"), options);
  const having = new Map();
  for (const image of IMAGES) for (const k of image.has.keys()) having.set(k, (having.get(k) ?? 0) + 1);
  const classes = PAGE.classes.map((name, k) => [k, `${name} (${having.get(k) ?? 0})`]);
  fillSelect(byId("class"), [["", "any"], ...classes.slice(1), classes[0]]);
  const used = [...having.keys()].filter((k) => k !== 0 && k !== OPEN).sort((a, b) => having.get(b) - having.get(a) || a - b);
  byId("legend").replaceChildren(...used.slice(0, 24).map(chip));
  if (used.length > 24) byId("legend").append(element("span", { class: "small" }, `${used.length - 24} more under “Shows class”`));
  if (having.has(OPEN)) byId("legend").append(element("span", { class: "class" }, swatch(OPEN), "left open"));
  byId("measures").replaceChildren(...Object.entries(PAGE.measures).map(rangeField));
}

function chip(k) {
  const button = element("button", { type: "button", class: "chip", "aria-pressed": "false", "data-class": k }, swatch(k), PAGE.classes[k]);
  button.addEventListener("click", () => change({ class: state.class === k ? null : k }));
  return button;
}

function rangeField([key, { name, help }]) {
  const ends = ["least", "most"].map((end, i) => {
    const input = element("input", { type: "number", min: 0, max: 100, step: "any", "aria-label": `${name}, at ${end}, in per cent`, "data-key": key, "data-end": i, placeholder: i ? "100" : "0" });
    input.addEventListener("input", () => {
      const now = [...(state.ranges[key] ?? [null, null])];
      now[i] = input.value === "" || !isFinite(input.value) ? null : Number(input.value);
      const ranges = { ...state.ranges, [key]: now };
      if (now.every((value) => value === null)) delete ranges[key];
      change({ ranges });
    });
    return input;
  });
  return element("div", { class: "range", title: help }, element("span", {}, name), ends[0], "to", ends[1], "%");
}

function change(what) {
  Object.assign(state, what);
  if (!("opacity" in what)) room = BATCH;
  show();
}

function show() {
  byId("sort").value = state.sort;
  byId("class").value = state.class ?? "";
  if (byId("query").value !== state.query) byId("query").value = state.query;
  for (const input of byId("measures").querySelectorAll("input")) {
    const value = state.ranges[input.dataset.key]?.[input.dataset.end] ?? null;
    if (document.activeElement !== input) input.value = value ?? "";
  }
  if (Object.keys(state.ranges).length) byId("ranges").open = true;
  for (const button of byId("legend").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.class) === state.class);
  }
  showOpacity();
  showGrid();
  writeHash();
}

function showOpacity() {
  byId("opacity").value = byId("opacity2").value = state.opacity;
  root.style.setProperty("--opacity", state.opacity / 100);
}

function listen() {
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("query").addEventListener("input", (event) => change({ query: event.target.value }));
  byId("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
  byId("class").addEventListener("change", (event) => change({ class: event.target.value === "" ? null : Number(event.target.value) }));
  for (const id of ["opacity", "opacity2"]) {
    byId(id).addEventListener("input", (event) => {
      state.opacity = Number(event.target.value);
      showOpacity();
      writeHash();
    });
  }
  byId("reset").addEventListener("click", () => {
    change({ class: null, query: "", ranges: {} });
    byId("query").focus();
  });
  byId("more").addEventListener("click", showMore);
  for (const side of ["left", "right"]) {
    byId(side).addEventListener("change", (event) => { viewer[side] = event.target.value; showStage(); });
  }
  const wipe = byId("wipe");
  wipe.addEventListener("input", moveDivider);
  wipe.addEventListener("keydown", (event) => { // a step that can be seen
    const by = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -20, PageUp: 20 }[event.key];
    if (!by) return;
    event.preventDefault();
    wipe.value = Number(wipe.value) + by * (event.shiftKey ? 5 : 1);
    moveDivider();
  });
  wipe.addEventListener("pointermove", tellPixel);
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("shut").addEventListener("click", () => byId("viewer").close());
  const dialog = byId("viewer");
  dialog.addEventListener("close", closed);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  window.addEventListener("hashchange", follow);
}

function follow() {
  if (!byId(location.hash.slice(1))) start(); // else it is a link within the page
}

function start() {
  readHash();
  const open = IMAGES[state.open];
  state.open = null;
  show();
  if (open) openViewer(open.at);
  else if (byId("viewer").open) byId("viewer").close();
}

byId("unscripted").remove();
fillControls();
listen();
start();
