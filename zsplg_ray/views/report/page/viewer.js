// One image, large: any two of photograph, label maps, truth and differences under a divider, all
// of them side by side below, and its numbers.

const viewer = { at: null, left: "photo", right: "0", indices: [] };

function views(at) {
  const { photo, maps } = pictures(at);
  const found = [["photo", "Image", !photo]];
  PAGE.layers.forEach((layer, i) => {
    if (layer.shown) found.push([String(i), layer.name, !maps[i]]);
  });
  for (let i = 1; i < PAGE.layers.length; i++) {
    if (PAGE.layers[i].shown) found.push([`0/${i}`, `${PAGE.layers[0].name} ≠ ${PAGE.layers[i].name}`, !maps[0] || !maps[i]]);
  }
  return found; // key, name, whether it is missing
}

// One view as elements that lie on top of each other.
function drawn(at, key, alt) {
  const { photo, why, maps } = pictures(at);
  const made = [];
  const words = key === "photo" ? "" : key.includes("/") ? ": differences" : `: ${inWords(IMAGES[at], Number(key))}`;
  const text = alt ? `${IMAGES[at].id}, ${alt}${words}` : "";
  if (photo) made.push(element("img", { src: photo, alt: text, class: key.includes("/") ? "dim" : null }));
  else if (key === "photo") made.push(emptyPicture(why));
  if (key.includes("/")) {
    const [a, b] = key.split("/").map(Number);
    if (maps[a] && maps[b]) made.push(differences(at, a, b));
    else made.push(emptyPicture("nothing to compare"));
  } else if (key !== "photo") {
    const map = maps[Number(key)];
    if (map && photo) made.push(element("img", { src: mapUrl(map), alt: "", class: "under-map" }));
    if (map) made.push(element("img", { src: mapUrl(map), alt: photo ? "" : text, class: "map" }));
    else made.push(emptyPicture(`no ${PAGE.layers[Number(key)].kind}`));
  }
  return made;
}

function differences(at, a, b) {
  const { width, height } = pictures(at).maps[0].png;
  const canvas = element("canvas", { width, height, class: "map sharp", "aria-hidden": "true" });
  Promise.all([indices(at, a), indices(at, b)]).then(([x, y]) => {
    if (!x || !y) return;
    const pixels = new ImageData(width, height);
    const colour = [235, 60, 60, 255];
    for (let i = 0; i < x.length; i++) {
      const skipped = b === TRUTH && y[i] === OPEN;
      const picked = state.class === null || x[i] === state.class || y[i] === state.class;
      if (x[i] !== y[i] && !skipped && picked) pixels.data.set(colour, 4 * i);
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  });
  return canvas;
}

function indices(at, i) {
  const map = pictures(at).maps[i];
  if (!map) return Promise.resolve(null);
  map.indices ??= indicesOf(map.png).catch(() => null);
  return map.indices;
}

function showStage() {
  const at = viewer.at;
  const names = new Map(views(at).map(([key, name]) => [key, name]));
  byId("left").value = viewer.left;
  byId("right").value = viewer.right;
  byId("pane-left").replaceChildren(...drawn(at, viewer.left, names.get(viewer.left)));
  byId("pane-right").replaceChildren(...drawn(at, viewer.right, names.get(viewer.right)));
  for (const button of byId("strip").children) {
    button.setAttribute("aria-pressed", button.dataset.key === viewer.right);
  }
  moveDivider();
}

function moveDivider() {
  const wipe = byId("wipe");
  const share = Number(wipe.value);
  const names = new Map(views(viewer.at).map(([key, name]) => [key, name]));
  byId("stage").style.setProperty("--wipe", `${share}%`);
  wipe.setAttribute("aria-label", `Divider between ${names.get(viewer.left)} and ${names.get(viewer.right)}`);
  wipe.setAttribute("aria-valuetext", `${Math.round(share)} % ${names.get(viewer.left)}`);
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, name, missing]) =>
    element("option", { value, disabled: Boolean(missing) }, name)));
}

function showImage(at) {
  viewer.at = at;
  const image = IMAGES[at];
  const { maps, photo } = pictures(at);
  const all = views(at);
  const there = (key) => all.some(([k, , missing]) => k === key && !missing);
  const first = all.find(([, , missing]) => !missing)?.[0] ?? "photo";
  if (!there(viewer.left)) viewer.left = first;
  if (!there(viewer.right)) viewer.right = there("0") ? "0" : first;
  fillSelect(byId("left"), all);
  fillSelect(byId("right"), all);
  const size = maps.find(Boolean)?.png;
  const [width, height] = image.size[0] ? image.size : [size?.width ?? 4, size?.height ?? 3];
  byId("stage").style.setProperty("--ratio", width / height);
  byId("viewer-id").textContent = image.id;
  const place = order.findIndex((other) => other.at === at);
  byId("viewer-at").textContent = place < 0 ? "" : `${place + 1} of ${order.length}`;
  byId("before").disabled = place <= 0;
  byId("after").disabled = place < 0 || place >= order.length - 1;
  byId("strip").replaceChildren(...all.map(([key, name, missing]) => {
    const box = element("span", { class: photo ? "picture-box" : "picture-box blank" }, ...drawn(at, key, ""));
    const map = image.maps[Number(key)];
    const told = map && map.miou !== null ? `${name} · mIoU ${two(map.miou)}` : name;
    const button = element("button", { type: "button", "data-key": key, disabled: Boolean(missing) }, box, element("span", {}, told));
    button.addEventListener("click", () => { viewer.right = key; showStage(); });
    return button;
  }));
  byId("numbers").replaceChildren(...numbersOf(image));
  showStage();
  state.open = String(at);
  writeHash();
}

function numbersOf(image) {
  const list = element("dl", { class: "facts" });
  const row = (name, value, help) => list.append(element("div", { title: help }, element("dt", {}, name), element("dd", {}, value)));
  for (const [key, { name, help }] of Object.entries(PAGE.measures)) row(name, shownAs(key, image.m[key]), help);
  if (image.size[0]) row("size", `${image.size[0]} × ${image.size[1]} px`);
  if (image.source) row("made by", image.source);
  const made = [list];
  if (image.notes.length) made.unshift(element("p", { class: "warn" }, image.notes.join("; ")));
  const shown = PAGE.layers.map((layer, i) => [layer, i]).filter(([layer, i]) => layer.shown && image.maps[i]);
  if (!shown.length) return made;
  const shares = shown.map(([, i]) => new Map(image.maps[i].shares));
  const classes = [...new Set(shares.flatMap((map) => [...map.keys()]))];
  const most = (k) => Math.max(...shares.map((map) => map.get(k) ?? 0));
  classes.sort((a, b) => (a === 0) - (b === 0) || most(b) - most(a));
  const head = element("tr", {}, element("th", { scope: "col" }, "class"),
    ...shown.map(([layer]) => element("th", { scope: "col", class: "num" }, layer.name)));
  const rows = classes.map((k) => element("tr", {},
    element("th", { scope: "row" }, element("span", { class: "class" }, swatch(k), className(k))),
    ...shares.map((map) => element("td", { class: "num" }, map.has(k) ? percent(map.get(k)) : "·"))));
  const scored = (name, key, show) => {
    if (!shown.some(([, i]) => image.maps[i][key] !== null)) return [];
    return [element("tr", { class: "sum" }, element("th", { scope: "row" }, name),
      ...shown.map(([, i]) => element("td", { class: "num" }, show(image.maps[i][key]))))];
  };
  const foot = [...scored("mIoU", "miou", two), ...scored("differs from truth", "wrong", percent),
    ...scored(`differs from ${PAGE.layers[0].name}`, "differs", percent)];
  const table = element("table", { class: "plain-table shares" },
    element("caption", {}, "Share of pixels"), element("thead", {}, head), element("tbody", {}, ...rows, ...foot));
  made.push(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Classes of this image" }, table));
  return made;
}

function openViewer(at) {
  const dialog = byId("viewer");
  showImage(at);
  if (!dialog.open) dialog.showModal();
  document.documentElement.classList.add("still");
}

function step(by) {
  const place = order.findIndex((image) => image.at === viewer.at) + by;
  if (place >= 0 && place < order.length) showImage(order[place].at);
}

function closed() {
  document.documentElement.classList.remove("still");
  state.open = null;
  writeHash();
  tiles.get(viewer.at)?.firstElementChild.focus(); // the image that was looked at last
}

async function tellPixel(event) {
  const box = byId("stage").getBoundingClientRect();
  const at = viewer.at;
  const size = pictures(at).maps.find(Boolean)?.png;
  if (!size) return;
  const [fx, fy] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (fx < 0 || fx >= 1 || fy < 0 || fy >= 1) return;
  const pixel = Math.floor(fy * size.height) * size.width + Math.floor(fx * size.width);
  const layers = PAGE.layers.map((layer, i) => [layer, i]).filter(([layer, i]) => layer.shown && pictures(at).maps[i]);
  const found = await Promise.all(layers.map(([, i]) => indices(at, i)));
  if (viewer.at !== at) return;
  const parts = layers.flatMap(([layer], n) => {
    if (!found[n]) return [];
    const k = found[n][pixel];
    return [element("span", { class: "class" }, swatch(k), `${layer.name}: ${className(k)}`)];
  });
  if (parts.length) byId("here").replaceChildren(...parts);
}
