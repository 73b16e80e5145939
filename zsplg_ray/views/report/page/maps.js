// Label maps: small palette PNGs of class indices. Here they get their colours (a new palette is
// written into the file, so the browser does all the drawing) and are read pixel by pixel, without
// a canvas, whose pixels some browsers falsify on purpose.

const OPEN = 255;

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function parsePng(bytes) {
  const view = new DataView(bytes.buffer);
  const png = { header: bytes.subarray(8, 33), width: view.getUint32(16), height: view.getUint32(20), body: [] };
  for (let at = 8; at < bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (kind === "IDAT") png.body.push(bytes.subarray(at, at + length + 12));
    at += length + 12;
  }
  return png;
}

const CRC = new Uint32Array(256).map((_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(kind, data) {
  const made = new Uint8Array(data.length + 12);
  const view = new DataView(made.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) made[4 + i] = kind.charCodeAt(i);
  made.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < data.length + 8; i++) crc = CRC[(crc ^ made[i]) & 255] ^ (crc >>> 8);
  view.setUint32(data.length + 8, ~crc >>> 0);
  return made;
}

const SIGNATURE = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
const END = chunk("IEND", new Uint8Array(0));

// The palette: every class in its colour, background clear, open pixels grey. One class alone if
// it is picked; then only it is coloured.
function palette(colours, picked) {
  const rgb = new Uint8Array(768);
  const alpha = new Uint8Array(256).fill(255);
  colours.forEach((colour, k) => {
    for (let c = 0; c < 3; c++) rgb[3 * k + c] = parseInt(colour.slice(1 + 2 * c, 3 + 2 * c), 16);
    if (picked !== null && k !== picked) alpha[k] = 0;
  });
  rgb.fill(128, 3 * OPEN);
  alpha[OPEN] = picked === null ? 190 : 0;
  if (picked !== 0) alpha[0] = 0;
  return [chunk("PLTE", rgb), chunk("tRNS", alpha)];
}

function painted(png, chunks) {
  return new Blob([SIGNATURE, png.header, ...chunks, ...png.body, END], { type: "image/png" });
}

// Class indices of all pixels, row by row; null where this browser cannot unpack them.
async function indicesOf(png) {
  if (!("DecompressionStream" in window)) return null;
  const packed = new Blob(png.body.map((part) => part.subarray(8, part.length - 4)));
  const stream = packed.stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const step = png.width + 1; // a line begins with its filter, which is none
  const found = new Uint8Array(png.width * png.height);
  for (let y = 0; y < png.height; y++) {
    if (raw[y * step] !== 0) return null;
    found.set(raw.subarray(y * step + 1, (y + 1) * step), y * png.width);
  }
  return found;
}
