"""Patterns over names: which names below a folder are meant, and which are passed over because they are hidden."""

from __future__ import annotations

import re

# Names of no data of the user's, as parts of a path: hidden ones by Spark's rule (_year=2024 is a partition), files
# under way, and what file managers, editors and stores leave behind.
HIDDEN = (
    r"(?:\.[^/]*|_[^/=]*|[^/]*(?:~|(?i:\.te?mp)|\.inprogress(?:\.[^/]*)?|\._COPYING_|_\$folder\$|\.crc|\.crdownload"
    r"|\.partial|\.swp)|(?i:thumbs\.db|desktop\.ini)|lost\+found|\$RECYCLE\.BIN|System Volume Information|@eaDir)"
)
_SEEN = rf"(?!{HIDDEN}(?:/|\Z))"
_MAGIC = re.compile(r"[*?\[]")
_IS_HIDDEN = re.compile(HIDDEN)


class Pattern:
    """A folder, which means all that is below it, or a pattern of * ** ? [].

    A folder that a pattern matches means all that is below it too. Hidden names are meant only by a part of the pattern
    that is itself such a name: `_temporary`, `*.tmp`.
    """

    def __init__(self, uri: str, is_folder: bool) -> None:
        literal = uri + "/" if is_folder else before_wildcards(uri)
        self.root = literal[: literal.rindex("/")].rstrip("/")
        parts = ["**"] if is_folder else uri[len(self.root) + 1 :].split("/")
        self._meant, self._loose = _Parts(parts, _SEEN), _Parts(parts, "")

    def means(self, name: str) -> bool:
        """Whether a name, relative to the root, is meant."""
        return self._meant.match(name)

    def enters(self, folder: str) -> bool:
        """Whether names below a folder, relative to the root, can be meant."""
        return self._meant.lead_to(folder)

    def hidden(self, name: str, is_folder: bool) -> str:
        """The topmost part for which a name is passed over that would be meant if it weren't hidden; else empty."""
        if not (self._loose.lead_to(name) if is_folder else self._loose.match(name)):
            return ""
        parts = name.split("/")
        at = next((number for number, part in enumerate(parts, 1) if _IS_HIDDEN.fullmatch(part)), 0)
        return "/".join(parts[:at])


class _Parts:
    """A pattern's parts as expressions; `seen` is what a name must be that no part names itself."""

    def __init__(self, parts: list[str], seen: str) -> None:
        any_name = f"{seen}[^/]+"
        whole, each = "", list[re.Pattern[str] | None]()
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            if part == "**":
                whole += f"(?:{any_name}/)*" + (any_name if last else "")
                each.append(None)
            else:
                named = not _MAGIC.search(part) or _IS_HIDDEN.fullmatch(part)
                text = ("" if named else seen) + _component(part)
                whole += text + ("" if last else "/")
                each.append(re.compile(text))
        self._whole = re.compile(f"{whole}(?:/{any_name})*")
        self._each, self._any = each, re.compile(any_name)

    def match(self, name: str) -> bool:
        return self._whole.fullmatch(name) is not None

    def lead_to(self, folder: str) -> bool:
        names = folder.split("/")
        for position, name in enumerate(names):
            if position >= len(self._each):  # below a folder that is matched
                return all(map(self._any.fullmatch, names[position:]))
            wanted = self._each[position]
            if wanted is None:
                rest = [each for each in self._each[position:] if each]
                return all(any(each.fullmatch(name) for each in (self._any, *rest)) for name in names[position:])
            if not wanted.fullmatch(name):
                return False
        return True


def before_wildcards(uri: str) -> str:
    """The part of a pattern before its wildcards: the whole of it, if it has none."""
    return _MAGIC.split(uri)[0]


def _component(part: str) -> str:
    text, position = "", 0
    while position < len(part):
        char = part[position]
        end = part.find("]", position + 2) if char == "[" else -1
        if end > 0:
            inside = part[position + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            text += "[" + ("^/" + inside[1:] if inside[0] == "!" else inside.replace("^", r"\^")) + "]"
            position = end
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
        position += 1
    return text
