// Opens pages in Chromium as people do, wide and narrow, light and dark, and says what is wrong with their looks:
//     CHROMIUM=/usr/bin/chromium NODE_PATH=BROWSER/node_modules node chaos/looks.cjs PICTURES PAGE...
// A request, an error, a page wider than its window, a text cut off or over its neighbour, a word broken that needn't be.
const path = require("node:path"), url = require("node:url");
const puppeteer = require("puppeteer-core");
const WIDTHS = [1400, 800, 390];

// Runs in the page.
function faults() {
  const found = [], room = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > room) found.push(`${document.documentElement.scrollWidth} wide in ${room}`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, holder = node.parentElement, scrolls = holder.closest(".wide");
    if (!node.data.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    if (!scrolls) for (const box of range.getClientRects()) {
      if (box.right > room + 1 || box.left < -1) found.push(`outside: ${node.data.trim()}`);
      texts.push([box, node]);
    }
    const columns = holder.closest("table")?.clientWidth ?? room;
    for (const word of node.data.matchAll(/[\p{L}\p{N}.,%]+/gu)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
      if (lines.size > 1 && word[0].length < 24 && columns > 200) found.push(`broken: ${word[0]}`);
    }
  }
  for (const [i, [a, one]] of texts.entries()) for (const [b, other] of texts.slice(i + 1)) {
    const over = Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 6;
    if (one !== other && over) found.push(`over each other: ${one.data.trim()} and ${other.data.trim()}`);
  }
  return [...new Set(found)].slice(0, 9);
}

async function main() {
  const [pictures, ...files] = process.argv.slice(2);
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM,
    args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
  });
  let wrong = 0, opened = 0;
  for (const file of files) for (const width of WIDTHS) for (const scheme of ["light", "dark"]) {
    const page = await browser.newPage(), seen = [], address = url.pathToFileURL(path.resolve(file)).href;
    page.on("request", (request) => { if (request.url() !== address) seen.push(`request: ${request.url()}`); });
    page.on("console", (message) => seen.push(`console: ${message.text()}`));
    page.on("pageerror", (error) => seen.push(`error: ${error}`));
    await page.setViewport({ width, height: 900, deviceScaleFactor: 1 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.goto(address, { waitUntil: "load" });
    seen.push(...await page.evaluate(faults));
    const name = `${path.basename(path.dirname(path.resolve(file)))}-${path.basename(file, ".html")}`;
    await page.screenshot({ path: path.join(pictures, `${name}-${width}-${scheme}.png`), fullPage: true });
    if (scheme === "light" && width === 1400) await page.pdf({ path: path.join(pictures, `${name}.pdf`), format: "A4" });
    opened += 1;
    for (const fault of seen) console.log(`${file} at ${width}, ${scheme}: ${fault}`);
    wrong += seen.length;
    await page.close();
  }
  console.log(`${opened} views of ${files.length} pages, ${wrong} faults`);
  await browser.close();
  process.exit(wrong || !opened ? 1 : 0);
}

main();
