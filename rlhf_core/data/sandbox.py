"""jinja2's sandbox for chat templates, which are foreign code: without functions, and with limits.

A template sees no Python function, whose globals it could look for. Every loop, call, filter and
operator that makes text or lists is charged to the limits of one rendering. Left out: a limit on a
single operation of jinja2 itself, such as a filter that sorts.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable

from rlhf_core.files import require

MAX_SIZE = 2**27  # characters and elements that one rendering may make
MAX_SECONDS = 5.0  # of CPU time
ELEMENT = 512  # what an element of a list counts in characters, because it takes time to visit
# Methods, filters and operators whose result can be as large as the product of two arguments.
_GROWING = {
    "*", "%", "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust",
    "pprint", "replace", "rjust", "slice", "string", "sum", "tojson", "translate", "wordwrap",
    "zfill",
}  # fmt: skip
_SIZED = (str, list, tuple, dict)
_FORMATS = ("%", "format", "format_map")
_SCOPES = ("_loop_vars", "_block_vars")  # what jinja2 adds to the arguments of a call
_WIDE = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*|\{[^{}]*\{")  # fields of a format that may be wide


def environment(now: Callable[[str], str] | None = None):
    """A new environment, with the extensions that Hugging Face's templates need.

    Call its `start` before a rendering.

    Args:
        now: The date and time in a format, as `strftime_now` of templates; None: those of now.
    """
    jinja, sandbox, ext, nodes, visitor, utils = (
        require(f"jinja2{name}", "train")
        for name in ("", ".sandbox", ".ext", ".nodes", ".visitor", ".utils")
    )

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: its body, between two marks of the context."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")], lineno=line)
                for side in ("opening", "closing")
            )
            return [opening, *body, closing]

    class Charged(visitor.NodeTransformer):
        """Makes the environment see each pass of a loop or macro, each `~` and each new list."""

        def visit_body(self, node):
            text = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
            charge = _call("tick", nodes.Const(text))
            node = self.generic_visit(node)
            node.body.insert(0, nodes.ExprStmt(charge).set_lineno(node.lineno))
            return node

        visit_For = visit_Macro = visit_CallBlock = visit_body

        def visit_Concat(self, node):
            parts = self.generic_visit(nodes.List(node.nodes))
            return nodes.Filter(parts, "join", [], [], None, None).set_lineno(node.lineno)

        def visit_collection(self, node):
            node = self.generic_visit(node)
            plain = getattr(node, "ctx", "load") == "store" or node.find(nodes.Name) is None
            return node if plain else _call("weigh", node).set_lineno(node.lineno)

        visit_List = visit_Tuple = visit_Dict = visit_collection

    def _call(name, argument):
        return nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def __init__(self):
            self.start()
            options = dict(trim_blocks=True, lstrip_blocks=True, finalize=self.written)
            super().__init__(extensions=[Generation, ext.loopcontrols], **options)
            named = {"range": sandbox.safe_range, "namespace": utils.Namespace, "dict": dict}
            named |= {"raise_exception": _raise, "strftime_now": now or _now}
            # A template gets objects without attributes. `call` puts the functions in their place.
            self.globals = {name: object() for name in named}
            self.functions = {id(self.globals[name]): named[name] for name in named}
            self.filters = {
                name: functools.wraps(function)(functools.partial(self.limited, name, function))
                for name, function in (self.filters | {"tojson": _tojson}).items()
            }

        def _parse(self, *arguments):
            return Charged().visit(super()._parse(*arguments))

        def start(self):
            """Start a new rendering with nothing used."""
            self.left, self.end = MAX_SIZE, time.thread_time() + MAX_SECONDS

        def charge(self, size):
            """Subtract from the size that is left. Raises SecurityError below 0."""
            self.left -= size
            if self.left < 0:
                raise sandbox.SecurityError(f"it makes more than {MAX_SIZE} characters")

        def tick(self, size):
            """Charge a pass of a loop or macro, which writes text of this size, and its time."""
            self.charge(size)
            if time.thread_time() > self.end:
                raise sandbox.SecurityError(f"it takes more than {MAX_SECONDS} s")

        def weigh(self, value):
            """Charge a value with all that is in it. Returns the value."""
            self.charge(self.extent(value))
            return value

        def extent(self, value):
            """Characters and ELEMENT per element at any depth, or the magnitude of a number."""
            total, parts = 0, [value]
            while parts and total <= MAX_SIZE:
                part = parts.pop()
                if isinstance(part, dict):
                    parts += [*part.keys(), *part.values()]
                elif isinstance(part, list | tuple | set | frozenset):
                    parts += part
                elif isinstance(part, utils.Namespace):  # its text has everything in it
                    return MAX_SIZE + 1
                total += len(part) if isinstance(part, str) else ELEMENT
            return abs(value) if type(value) is int else total

        def written(self, value):
            """The text of a value that a template writes."""
            value = value if isinstance(value, str) else str(self.weigh(value))
            self.charge(len(value))
            return value

        def limited(self, name, function, /, *args, **kwargs):
            """The result of a function, whose size is charged. name: See _GROWING."""
            if name in _GROWING:
                given = [*args, *(kwargs[key] for key in kwargs if key not in _SCOPES)]
                *_, second, first = [1, 1, *sorted(map(self.extent, given))]
                if first * second > 2 * MAX_SIZE:
                    self.charge(MAX_SIZE + 1)
                if any(
                    isinstance(x, str) and _WIDE.search(x) for x in given[:1] * (name in _FORMATS)
                ):
                    raise sandbox.SecurityError("it formats a field of unlimited width")
            result = function(*args, **kwargs)
            if isinstance(result, _SIZED):
                self.charge(len(result))
            elif type(result) is int:
                self.charge(result.bit_length())
            return result

        def call_binop(self, context, operator, left, right):
            if operator == "+":  # by far the most frequent
                result = left + right
                if isinstance(result, _SIZED):
                    self.charge(len(result))
                return result
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if operator == "**" and numbers and abs(right) > 64:
                raise sandbox.SecurityError(f"the exponent {right} is beyond 64")
            name = "" if numbers else operator
            return self.limited(name, self.binop_table[operator], left, right)

        def call(self, context, function, /, *args, **kwargs):
            function = self.functions.get(id(function), function)
            method = getattr(function, "__wrapped__", function)  # str.format is wrapped
            owner, call = getattr(method, "__self__", None), super().call
            if owner is self:  # `tick` or `weigh`, which only `Charged` can name
                return function(*args)
            if function in (dict, utils.Namespace):
                self.charge(self.extent([kwargs[key] for key in kwargs if key not in _SCOPES]))
            if not isinstance(owner, str):
                return self.limited("", call, context, function, *args, **kwargs)

            def of_text(owner, /, *args, **kwargs):
                return call(context, function, *args, **kwargs)

            return self.limited(method.__name__, of_text, owner, *args, **kwargs)

    def _raise(message):
        raise jinja.TemplateError(message)

    return Environment()


def undeclared(environment, source: str) -> set[str]:
    """The variables that a template reads and does not set."""
    return require("jinja2.meta", "train").find_undeclared_variables(environment.parse(source))


def _now(format):
    return datetime.datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    options = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
