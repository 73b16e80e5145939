// What is shown, and how: read from the address, and kept in it, so that a view can be bookmarked.

const PAGE = JSON.parse(document.getElementById("index").textContent);
const IMAGES = PAGE.images.map((image, at) => ({ ...image, at, has: classesOf(image) }));
const TRUTH = PAGE.layers.length - 1;
const LOW_FIRST = new Set(["confidence", "miou", "coverage"]); // where low means: look at it

const state = { sort: "doubt-", class: null, query: "", ranges: {}, opacity: 60, open: null };

function classesOf(image) {
  const shares = new Map();
  if (image.maps[0]) for (const [k, share] of image.maps[0].shares) shares.set(k, share);
  return shares;
}

function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inside.filter((part) => part !== null));
  return made;
}

const byId = (id) => document.getElementById(id);
const className = (k) => (k === OPEN ? "left open" : PAGE.classes[k]);

function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  if (value === 0 || value >= 9.95) return `${value.toFixed(0)} %`;
  return value >= 0.095 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

const two = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
const isScore = (key) => key === "confidence" || key === "miou" || key === "doubt";
const shownAs = (key, value) => (isScore(key) ? two(value) : percent(value));

function swatch(k) {
  return element("i", { class: `sw k${k}` });
}

function readHash() {
  const found = new URLSearchParams(location.hash.slice(1));
  const known = [...byId("sort").options].map((option) => option.value);
  state.sort = known.includes(found.get("sort")) ? found.get("sort") : known[0];
  const k = found.has("class") ? Number(found.get("class")) : NaN;
  state.class = Number.isInteger(k) && k >= 0 && k < PAGE.classes.length ? k : null;
  state.query = found.get("find") ?? "";
  state.ranges = {};
  for (const key of Object.keys(PAGE.measures)) {
    const [low, high] = (found.get(key) ?? "").split("..");
    const ends = [low, high].map((text) => (text && isFinite(text) ? Number(text) : null));
    if (ends.some((end) => end !== null)) state.ranges[key] = ends;
  }
  const opacity = found.has("opacity") ? Number(found.get("opacity")) : 60;
  state.opacity = opacity >= 0 && opacity <= 100 ? opacity : 60;
  state.open = found.has("open") ? found.get("open") : null;
}

function writeHash() {
  const told = new URLSearchParams();
  if (state.sort !== byId("sort").options[0].value) told.set("sort", state.sort);
  if (state.class !== null) told.set("class", state.class);
  if (state.query) told.set("find", state.query);
  for (const [key, ends] of Object.entries(state.ranges)) {
    told.set(key, ends.map((end) => end ?? "").join(".."));
  }
  if (state.opacity !== 60) told.set("opacity", state.opacity);
  if (state.open !== null) told.set("open", state.open);
  const hash = told.toString();
  if (!hash && byId(location.hash.slice(1))) return; // a link within the page
  if (hash !== location.hash.slice(1)) {
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }
}

function isFiltered() {
  return state.class !== null || state.query !== "" || Object.keys(state.ranges).length > 0;
}

function matching() {
  const query = state.query.toLowerCase();
  const found = IMAGES.filter((image) => {
    if (query && !image.id.toLowerCase().includes(query)) return false;
    if (state.class !== null && !image.has.has(state.class)) return false;
    return Object.entries(state.ranges).every(([key, [low, high]]) => {
      const value = image.m[key];
      if (value === null) return false;
      return (low === null || value * 100 >= low) && (high === null || value * 100 <= high);
    });
  });
  const key = state.sort.slice(0, -1);
  const sign = state.sort.endsWith("-") ? -1 : 1;
  if (key === "id") return sign > 0 ? found : found.reverse();
  const last = (a, b) => (a === null) - (b === null); // what has no value stands last
  return found.sort((a, b) => {
    const [x, y] = [a.m[key], b.m[key]];
    return x === null || y === null ? last(x, y) || a.at - b.at : sign * (x - y) || a.at - b.at;
  });
}
