"""The job's Jinja template: which columns its source reads, what is wrong with it, and a row -> the user's message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jinja2
import jinja2.meta
from jinja2 import nodes

from batchq.errors import ConfigError, RowError
from batchq.task.sandbox import Sandbox, environment

OURS = frozenset({"row", "choices", "labels"})  # names that a template may use besides the input's columns
CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}
COLUMNS_NAMED = 30  # in a message
# Text that other template languages would fill in: {name}, ${name}, $name, %(name)s.
PLACEHOLDER = re.compile(r"(?<![{\w])\$?\{(\w+)\}(?!\})|\$(\w+)|%\((\w+)\)s")


def names_in(source: str) -> set[str]:
    """The names that a template uses: columns, those of OURS, and Jinja's functions.

    Raises ConfigError if it is no valid Jinja.
    """
    return _names(_parsed(source))


def columns_in(source: str) -> set[str]:
    """The columns that a template asks for by name, whether they are there or not. Raises ConfigError as `names_in`."""
    tree = _parsed(source)
    return (_names(tree) - OURS - _functions()) | _lookups(tree).columns


def required_columns(source: str) -> set[str]:
    """Those of them for whose absence it has no answer, such as a default."""
    tree = _parsed(source)
    return (_names(tree) - OURS - _functions()) | _lookups(tree).required


def prompt_columns(source: str, columns: Sequence[str]) -> list[str]:
    """The input columns that a template reads, all of them if it reads `row` as a whole.

    Raises ConfigError if it is no valid Jinja or names a column that isn't there.
    """
    tree = _parsed(source, columns)
    names, lookups = _names(tree), _lookups(tree)
    if missing := sorted(names - set(columns) - OURS - _functions()):
        raise _no_column(missing, columns)
    if "row" in names and not lookups.complete:
        return list(columns)
    return [c for c in columns if c in (names - {"row"}) | lookups.columns]


def check_prompt(source: str, columns: Sequence[str], constant: bool) -> None:
    """What a new run is refused for. `constant`: the prompt may read no column at all.

    Raises ConfigError as `prompt_columns`, and where a name is both a column and a word of Jinja's or batchq's, where a
    filter, a test or another template isn't there, or every row would be asked the same.
    """
    reads = prompt_columns(source, columns)
    tree = _parsed(source, columns)
    for line, words in _impossible(tree, environment()):
        raise ConfigError(f"task.prompt, line {line}: {words}")
    _refuse_ambiguous(tree, columns)
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    functions = (n for n in tree.find_all(nodes.Name) if n.name in _functions() | {"self"} and n.ctx == "load")
    if printed := sorted({n.name for n in functions if id(n) not in called and n.name not in columns}):
        raise _no_column(printed, columns)
    if missing := sorted(_lookups(tree).required - set(columns)):
        raise _no_column(missing, columns)
    if not reads and not constant:
        plain = placeholders(source, columns)
        hint = f"{plain[0]} is plain text to Jinja, " if plain else ""
        raise ConfigError(
            f"task.prompt reads no column, so every row would be asked the same; {hint}a column is written "
            f"{{{{ {_spelled(_asked(plain, columns))} }}}}; task.constant_prompt=true if that is meant"
        )


def placeholders(source: str, columns: Sequence[str]) -> list[str]:
    """What of a template's plain text looks like a column, as another template language would write it: {text}."""
    known = set(columns)
    found: dict[str, None] = {}
    for data in _parsed(source).find_all(nodes.TemplateData):
        for match in PLACEHOLDER.finditer(data.data):
            if next(filter(None, match.groups())) in known:
                found[match[0]] = None
    return list(found)


class Template:
    """The job's template of the user's message. Thread-safe."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        """`columns`: the input's column names. Raises ConfigError as `prompt_columns` does."""
        self.reads = prompt_columns(source, columns)
        lookups = _lookups(_parsed(source, columns))
        self._whole_row = "row" in names_in(source) and not lookups.complete
        self._others = sorted(lookups.columns.difference(self.reads))  # of JSON rows with more keys than were known
        self._template = environment().from_string(source)
        self._globals = dict(self._template.globals)  # Jinja would merge them from a chain of maps for each row

    def render(self, columns: Mapping[str, Any], choices: str, labels: Sequence[str]) -> str:
        """The message for one row. Raises RowError for a row that can't fill the template."""
        # A key that a JSON row lacks is null, as it is in the table; so is a NaN, which is what pandas makes of a null.
        read: dict[str, Any] = {}
        empty = bool(self.reads)
        for name in self.reads:
            value = _read(columns, name)
            if type(value) is float and value != value:
                value = None
            empty = empty and (value is None or (isinstance(value, str) and not value.strip()))
            read[name] = value
        if empty:
            raise RowError("empty", "every column that the prompt reads is empty in this row")
        for name in columns if self._whole_row else [name for name in self._others if name in columns]:
            if name not in read:
                read[name] = _read(columns, name)
        try:
            scope = {"row": read, "choices": choices, "labels": labels}
            context = self._template.new_context({**self._globals, **read, **scope}, shared=True)
            return "".join(self._template.root_render_func(context))
        except jinja2.UndefinedError as error:
            raise RowError("missing_value", "the prompt reads something that this row lacks") from error
        except jinja2.TemplateError as error:
            raise RowError("prompt", f"the prompt could not be rendered: {type(error).__name__}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RowError("prompt", f"the prompt failed on this row: {type(error).__name__}") from error


def _read(columns: Mapping[str, Any], name: str) -> Any:
    """A column's value in a row; one that can't be read fails the row only where the template uses it."""
    try:
        return columns.get(name)
    except RowError as error:
        unreadable = error
        return jinja2.StrictUndefined(exc=cast(Any, lambda _: unreadable))


# -- the source ------------------------------------------------------------------------------


@cache
def _functions() -> frozenset[str]:
    return frozenset(environment().globals)


def _parsed(source: str, columns: Sequence[str] = ()) -> nodes.Template:
    """Raises ConfigError if it is no valid Jinja. Its environment has no functions: a column may be called like one."""
    made = environment()
    made.globals.clear()
    try:
        tree = made.parse(source)
        jinja2.meta.find_undeclared_variables(tree)  # which compiles it: an unknown filter shows only then
        return tree
    except jinja2.TemplateSyntaxError as error:
        said = (error.message or "can't be read").rstrip(".")
        odd = next((c for c in columns if c in source and not _is_plain(c)), None)
        hint = "" if odd is None else f"; a column whose name is no plain word is written {_spelled(odd)}"
        if match := _NO_FILTER.search(said):
            hint = _near(match[1], [*made.filters, *made.tests])
        raise ConfigError(f"task.prompt, line {error.lineno}: {said}{hint}") from error


_NO_FILTER = re.compile(r"No (?:filter|test) named '(.*?)'")


def _names(tree: nodes.Template) -> set[str]:
    return jinja2.meta.find_undeclared_variables(tree)


@dataclass(frozen=True, slots=True)
class _Lookups:
    """Columns that a template takes out of `row`: row['my col'], row.text. `complete`: `row` is used in no other way.
    `required`: those for whose absence the template has no answer."""

    columns: frozenset[str]
    required: frozenset[str]
    complete: bool


def _lookups(tree: nodes.Template) -> _Lookups:
    uses = [n for n in tree.find_all(nodes.Name) if n.name == "row"]
    if any(n.ctx != "load" for n in uses):  # the template's own variable
        return _Lookups(frozenset(), frozenset(), False)
    found = {id(node): name for node in tree.find_all((nodes.Getitem, nodes.Getattr)) if (name := _looked_up(node))}
    optional = {id(f.node) for f in tree.find_all(nodes.Filter) if f.name in ("default", "d")}
    optional |= {id(t.node) for t in tree.find_all(nodes.Test) if t.name in ("defined", "undefined")}
    always = frozenset(name for node, name in found.items() if node not in optional)
    guarded = frozenset(name for node, name in found.items() if node in optional)
    return _Lookups(always | guarded, always - guarded, len(found) == len(uses))


def _looked_up(node: nodes.Node) -> str | None:
    """The column that row['column'] or row.column takes; None for anything else, a dict's own methods included."""
    base: nodes.Node = getattr(node, "node", node)
    if not isinstance(base, nodes.Name) or base.name != "row":
        return None
    if isinstance(node, nodes.Getattr):
        return None if hasattr(dict, node.attr) else node.attr
    constant = getattr(node, "arg", None)
    return constant.value if isinstance(constant, nodes.Const) and isinstance(constant.value, str) else None


def _impossible(tree: nodes.Template, known: Sandbox) -> Iterator[tuple[int, str]]:
    """Lines and words of what would fail every row that comes by: Jinja looks at it only then."""
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        name, kind = node.name, "filter" if isinstance(node, nodes.Filter) else "test"
        there = known.filters if kind == "filter" else known.tests
        if name is not None and name not in there:
            yield node.lineno, f"no {kind} is called {name}{_near(name, there)}"
    for other in tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
        word = re.sub(r"(?<!^)(?=[A-Z])", " ", type(other).__name__).lower()
        yield other.lineno, f"{word}: a prompt stands alone; there are no other templates"


def _refuse_ambiguous(tree: nodes.Template, columns: Sequence[str]) -> None:
    """Raises ConfigError for a name that the template uses and that is a column and a word of Jinja's or ours."""
    taken = set(columns)
    lookups = _lookups(tree)
    used = _names(tree) & taken & (OURS | _functions())
    if "row" in used and lookups.complete:
        used.discard("row")  # row['...'] is the row
    used |= {n.name for n in tree.find_all(nodes.Name) if n.name == "self"} & taken
    constants = [c.value for c in tree.find_all(nodes.Const)]
    used |= {name for name, value in CONSTANTS.items() if name in taken and any(c is value for c in constants)}
    methods = (n for n in tree.find_all(nodes.Getattr) if isinstance(n.node, nodes.Name) and n.node.name == "row")
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    used |= {n.attr for n in methods if hasattr(dict, n.attr) and n.attr in taken and id(n) not in called}
    if name := min(used, default=None):
        whose = "batchq" if name in OURS else "Jinja"
        raise ConfigError(
            f"task.prompt uses {name}, which is a column of the input and a word of {whose}'s: write row['{name}'] for "
            "the column; for the other leave the column out with input.columns"
        )


def _no_column(missing: Sequence[str], columns: Sequence[str]) -> ConfigError:
    known = ", ".join(columns[:COLUMNS_NAMED]) + (", ..." if len(columns) > COLUMNS_NAMED else "")
    return ConfigError(
        f"task.prompt uses {', '.join(missing)}, not a column of the input{_near(missing[0], columns)}; "
        f"columns are {known}"
    )


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint at names like this one, as a template writes them; empty where there is none."""
    folded = {each.casefold(): each for each in known}
    found = [folded[each] for each in difflib.get_close_matches(name.casefold(), folded, 2)]
    found += [each for each in known if not _is_plain(each) and name in re.split(r"\W+", each) and each not in found]
    return f" (did you mean {' or '.join(map(_spelled, found[:2]))}?)" if found else ""


def _spelled(column: str) -> str:
    """How a template writes a column."""
    return column if _is_plain(column) else f"row[{column!r}]"


def _is_plain(column: str) -> bool:
    return column.isidentifier() and column not in {"not", *CONSTANTS}


def _asked(plain: Sequence[str], columns: Sequence[str]) -> str:
    """The column for an example: the one that was written in another way, else the first."""
    return re.sub(r"\W+|(?<=\))s$", "", plain[0]) if plain else (columns[0] if columns else "text")
