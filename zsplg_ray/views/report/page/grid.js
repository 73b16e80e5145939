// The grid: a tile for each image that matches. Pictures are made when a tile comes near the
// screen, some dozens of tiles at a time.

const BATCH = 48;
const tiles = new Map(); // image number -> its element, made once
const loaded = new Map(); // image number -> its pictures, unpacked
let order = [];
let room = BATCH;

function pictures(at) {
  if (!loaded.has(at)) {
    const data = JSON.parse(byId(`image-${at}`).textContent);
    const photo = data.photo && URL.createObjectURL(new Blob([bytesOf(data.photo)], { type: "image/jpeg" }));
    const maps = data.maps.map((map) => map && { png: parsePng(bytesOf(map)), url: null, picked: undefined });
    loaded.set(at, { photo, why: data.why, maps });
  }
  return loaded.get(at);
}

// The address of a map in its colours; the last one is kept until other colours are asked for.
function mapUrl(map) {
  if (map.picked !== state.class) {
    if (map.url) URL.revokeObjectURL(map.url);
    map.url = URL.createObjectURL(painted(map.png, palette(PAGE.colours, state.class)));
    map.picked = state.class;
  }
  return map.url;
}

function inWords(image, at = 0) {
  const map = image.maps[at];
  if (!map) return "no labels";
  const told = map.shares.filter(([k]) => k !== 0).slice(0, 6);
  return told.map(([k, share]) => `${className(k)} ${percent(share)}`).join(", ") || "all background";
}

function emptyPicture(why) {
  return element("span", { class: "none" }, why || "no picture");
}

function tileOf(image) {
  if (tiles.has(image.at)) return tiles.get(image.at);
  const id = element("span", { class: "id", dir: "auto" });
  id.textContent = image.id;
  const numbers = element("span", { class: "meta" });
  const swatches = element("span", { class: "swatches", "aria-hidden": "true" });
  for (const [k] of [...image.has].filter(([k]) => k !== 0 && k !== OPEN).slice(0, 8)) swatches.append(swatch(k));
  const note = image.notes.length ? element("span", { class: "note" }, image.notes.join("; ")) : null;
  const button = element("button", { type: "button", class: "tile", "aria-haspopup": "dialog", "data-at": image.at },
    element("span", { class: "picture-box" }), id, element("span", { class: "under" }, numbers, swatches), note);
  button.addEventListener("click", () => openViewer(image.at));
  const tile = element("li", {}, button);
  tiles.set(image.at, tile);
  return tile;
}

// Two numbers under a tile: what the grid is sorted by, and the most telling other one.
function tellNumbers(tile) {
  const image = IMAGES[Number(tile.firstElementChild.dataset.at)];
  const sorted = state.sort.slice(0, -1);
  const keys = [sorted, "miou", "confidence", "coverage"].filter((key) => key in PAGE.measures && image.m[key] !== null);
  const short = { wrong: "wrong", differs: "differs" };
  tile.querySelector(".meta").replaceChildren(...[...new Set(keys)].slice(0, 2).map((key) =>
    element("span", { title: PAGE.measures[key].help }, `${short[key] ?? PAGE.measures[key].name} ${shownAs(key, image.m[key])}`)));
}

function fill(tile) {
  const box = tile.querySelector(".picture-box");
  const at = Number(tile.firstElementChild.dataset.at);
  const { photo, why, maps } = pictures(at);
  if (!box.firstChild) {
    const alt = `${IMAGES[at].id}: ${inWords(IMAGES[at])}`;
    if (photo) box.append(element("img", { src: photo, alt, decoding: "async" }));
    else box.append(element("span", { class: "unseen" }, alt));
    if (maps[0] && photo) box.append(element("img", { class: "under-map", alt: "", decoding: "async" }));
    if (maps[0]) box.append(element("img", { class: "map", alt: "", decoding: "async" }));
    if (!photo && !maps[0]) box.append(emptyPicture(why));
    box.classList.toggle("blank", !photo);
  }
  for (const map of box.querySelectorAll(".map, .under-map")) map.src = mapUrl(maps[0]);
}

const near = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      near.add(entry.target);
      fill(entry.target);
    } else near.delete(entry.target);
  }
}, { rootMargin: "400px" });

function showGrid() {
  order = matching();
  const some = order.slice(0, room).map(tileOf);
  some.forEach(tellNumbers);
  observer.disconnect();
  near.clear();
  byId("grid").replaceChildren(...some);
  some.forEach((tile) => observer.observe(tile));
  const all = IMAGES.length;
  byId("count").textContent = order.length === all ? `${all} images` : `${order.length} of ${all} images`;
  if (order.length === 0) byId("count").textContent = "No image fits these filters.";
  byId("reset").hidden = !isFiltered();
  byId("more").hidden = order.length <= room;
  byId("more").textContent = `Show ${Math.min(BATCH, order.length - room)} more of ${order.length - room}`;
}

function showMore() {
  const first = room;
  room += BATCH;
  showGrid();
  byId("grid").children[first]?.firstElementChild.focus();
}

function repaint() {
  near.forEach(fill);
}
