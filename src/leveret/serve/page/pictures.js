// Pictures on their way to the model: out of a drop, a paste or the file picker; checked, turned, made small enough.

// What is larger is scaled down before it is sent: models look at far fewer pixels.
export const SIDE = 2048;
const BYTES = 3_000_000;
const QUALITY = 0.9;

const SENT = { "\u00ff\u00d8\u00ff": "image/jpeg", "\u0089PNG": "image/png" };

// What the bytes are, whatever the name says; null for what the server does not take as it is.
async function kindOf(file) {
  const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  if (head.startsWith("RIFF") && head.slice(8) === "WEBP") return "image/webp";
  return Object.entries(SENT).find(([start]) => head.startsWith(start))?.[1] ?? null;
}

// An element that holds the file's picture, upright (a browser turns it as its EXIF says).
async function decoded(file) {
  const address = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    if (!image.naturalWidth || !image.naturalHeight) throw new Error("no size");
    return image;
  } finally {
    URL.revokeObjectURL(address);
  }
}

// Halved until one last step is left: each pixel counts, and lines do not break.
function drawnAt(image, width, height) {
  let source = image;
  let [w, h] = [image.naturalWidth, image.naturalHeight];
  do {
    [w, h] = [Math.max(width, Math.ceil(w / 2)), Math.max(height, Math.ceil(h / 2))];
    const canvas = Object.assign(document.createElement("canvas"), { width: w, height: h });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(source, 0, 0, w, h);
    source = canvas;
  } while (w > width || h > height);
  return source;
}

const encoded = (canvas, kind) => new Promise((yes, no) =>
  canvas.toBlob((blob) => (blob ? yes(blob) : no(new Error("not encoded"))), kind, QUALITY));

function onWhite(canvas) {
  const flat = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const pen = flat.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, flat.width, flat.height);
  pen.drawImage(canvas, 0, 0);
  return flat;
}

// A file -> {blob, name, width, height, told}: told says what was done to it, or is empty. Throws an Error whose
// message is for the reader where it is no picture.
export async function prepared(file) {
  const name = file.name || "picture";
  if (file.type && !file.type.startsWith("image/")) throw new Error(`${name} is not a picture.`);
  if (file.size > 200_000_000) throw new Error(`${name} is larger than 200 MB.`);
  let image;
  try {
    image = await decoded(file);
  } catch {
    throw new Error(`${name} is no picture that this browser can read. JPEG, PNG and WebP work everywhere.`);
  }
  const [from, below] = [image.naturalWidth, image.naturalHeight];
  const kind = await kindOf(file);
  const scale = Math.min(1, SIDE / Math.max(from, below));
  if (scale === 1 && kind !== null && file.size <= BYTES) {
    return { blob: file.slice(0, file.size, kind), name, width: from, height: below, told: "" };
  }
  const [width, height] = [Math.max(1, Math.round(from * scale)), Math.max(1, Math.round(below * scale))];
  let blob;
  try {
    const canvas = drawnAt(image, width, height);
    // Drawings stay sharp as PNG; photographs, and drawings that come out large, are JPEG.
    blob = kind === "image/jpeg" ? null : await encoded(canvas, "image/png");
    if (blob === null || blob.size > BYTES) blob = await encoded(onWhite(canvas), "image/jpeg");
  } catch {
    throw new Error(`${name} is too large for this browser (${from} \u00d7 ${below}).`);
  }
  const told = scale < 1 ? `scaled down from ${from} \u00d7 ${below} to ${width} \u00d7 ${height}`
    : kind === null ? `sent as ${blob.type.slice(6).toUpperCase()}, its first picture alone` : "sent as JPEG";
  return { blob, name, width, height, told };
}

// The files of a drop or a paste.
export function filesOf(transfer) {
  const files = [...(transfer?.files ?? [])];
  if (files.length) return files;
  return [...(transfer?.items ?? [])].filter((one) => one.kind === "file").map((one) => one.getAsFile()).filter(Boolean);
}

export const dataUri = (blob) => new Promise((yes, no) => {
  const reader = new FileReader();
  reader.onload = () => yes(reader.result);
  reader.onerror = () => no(reader.error);
  reader.readAsDataURL(blob);
});
