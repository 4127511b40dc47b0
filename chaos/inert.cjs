// Opens every page that `python -m chaos.inert` wrote in Chromium and counts what was executed; see there.
const fs = require("node:fs"), path = require("node:path"), url = require("node:url");
process.env.AWS_EXECUTION_ENV ??= "AWS_Lambda_nodejs22.x"; // so that the package unpacks Chromium's libraries too
const puppeteer = require("puppeteer-core");

// What a page did that text doesn't do: a dialog, a request, a navigation, a word on the console, an element to act with.
const ALLOWED = "html,head,meta,title,style,body,header,footer,section,div,h1,h2,p,small,span,dl,dt,dd,table,tbody,tr,th,td,svg,rect,line,circle";
const PLACES = "class,lang,charset,http-equiv,content,name,x,y,width,height,x1,y1,x2,y2,cx,cy,r,aria-hidden".split(",");

async function look(browser, file) {
  const page = await browser.newPage(), seen = [], address = url.pathToFileURL(file).href;
  page.on("dialog", (dialog) => { seen.push("dialog"); dialog.dismiss().catch(() => {}); }); // the page may be closing
  page.on("request", (request) => { if (request.url() !== address) seen.push("request"); });
  page.on("framenavigated", (frame) => { if (frame.url() !== address) seen.push("navigation"); });
  page.on("console", () => seen.push("console"));
  page.on("popup", () => seen.push("popup"));
  await page.goto(address, { waitUntil: "load" });
  await new Promise((done) => setTimeout(done, 150));
  const odd = await page.evaluate((allowed, places) => {
    for (const element of document.querySelectorAll("body *")) {
      element.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
      element.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true })); // SVG has no click()
    }
    const strange = [...document.querySelectorAll("*")].filter((e) => e.getAttributeNames().some((n) => !places.includes(n)));
    return document.querySelectorAll(`:not(${allowed})`).length + strange.length;
  }, ALLOWED, PLACES).catch(() => 1); // the page went elsewhere
  await new Promise((done) => setTimeout(done, 150));
  if (odd) seen.push("element");
  await page.close();
  return [...new Set(seen)];
}

async function launch() {
  if (process.env.CHROMIUM) return puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  const chromium = require("@sparticuz/chromium");
  return puppeteer.launch({ executablePath: await chromium.executablePath(), args: chromium.args, headless: "shell" });
}

async function main() {
  const folder = process.argv[2], acted = {}, opened = {};
  const browser = await launch();
  for (const name of fs.readdirSync(folder).filter((name) => name.endsWith(".html")).sort()) {
    const kind = name.split(".")[1], seen = await look(browser, path.resolve(folder, name));
    opened[kind] = (opened[kind] ?? 0) + 1;
    acted[kind] = (acted[kind] ?? 0) + (seen.length > 0);
    if (seen.length && kind !== "control") console.log(`${name}: ${seen.join(", ")}`);
  }
  console.log(`${await browser.version()}`);
  for (const kind of Object.keys(opened)) console.log(`${kind}: ${opened[kind]} pages opened, ${acted[kind]} did something`);
  await browser.close();
  process.exit(acted.report || acted.many || !acted.control ? 1 : 0);
}

main();
