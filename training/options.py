"""Options of a script: the fields of dataclasses, with their ranges, help and errors.

Nothing heavy is imported here, so that a wrong option is answered at once.
"""

import argparse
import difflib
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings


class RunError(ValueError):
    """An error that the user can fix.

    Its message says what was found, what is wanted and which option changes it. Scripts print it without a
    traceback.
    """


@dataclass(frozen=True)
class Range:
    """The values that an option takes: in words, and as a test of one value, which NaN must fail."""

    wanted: str
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Range("a whole number above 0", lambda value: value > 0)]
NonNegativeInt = Annotated[int, Range("a whole number, 0 or more", lambda value: value >= 0)]
Positive = Annotated[float, Range("a number above 0", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[float, Range("a number, 0 or more", lambda value: 0 <= value < math.inf)]
Finite = Annotated[float, Range("a finite number", math.isfinite)]
Share = Annotated[float, Range("a number from 0 to 1", lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, Range("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Text = Annotated[str, Range("text that is not empty", lambda value: value.strip("\0 ") != "")]


def option(
    default: Any,
    *,
    resume: Literal["fixed", "while_unused", "free", "unrecorded"] = "fixed",
    basic: bool = False,
    ignored_if: tuple = (),
) -> Any:
    """A field of a configuration; options without any of these marks have a plain default.

    Args:
        default: its value if none is given.
        resume: whether a run may continue with another value. `fixed`: not once its stage has begun.
            `while_unused`: until the denoiser has begun to learn from its stage. `free`: at any time.
            `unrecorded`: it concerns a single call and is not stored.
        basic: whether `--help` shows it; `--help_all` shows all.
        ignored_if: name of another option of the section, and its values for which this one has no effect.
    """
    metadata = {"resume": resume, "basic": basic, "ignored_if": ignored_if}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


free = partial(option, resume="free")
tunable = partial(option, resume="while_unused")


def options(section: type, prefix: str = "") -> dict[str, Field]:
    """The options in a tree of dataclasses by their dotted names."""
    found = {}
    for entry in fields(section):
        name = prefix + entry.name
        found |= options(entry.type, f"{name}.") if is_dataclass(entry.type) else {name: entry}
    return found


def default_of(entry: Field) -> Any:
    """The value of an option that is not given."""
    return entry.default_factory() if entry.default is MISSING else entry.default


def wanted(kind: Any) -> str:
    """The values that an option of this type takes, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1].wanted
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        number = "a list" if origin is list else f"{len(inner)} values"
        return f"{number} in brackets, each {wanted(inner[0])}"
    return wanted(inner[0]) if inner else {bool: "true or false", str: "text"}[kind]  # inner: X | None


def in_range(value: Any, kind: Any) -> bool:
    """Whether `value`, which has the right type, is in the range of an option of type `kind`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1].holds(value)
    if origin in (list, tuple):
        return all(in_range(each, inner[0]) for each in value)
    return value is None or type(None) not in inner or in_range(value, inner[0])


def written(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


class _StrictLoader(yaml.SafeLoader):
    """YAML without keys given twice, and without names of code, which would be imported."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: {key.value!r} is given twice: leave one")
            if key.value == "class_path":
                raise yaml.YAMLError(f"line {line}: class_path is no option")
            if key.value == "features" and re.fullmatch(r"[\w.]+:[\w.]+", str(value.value)):
                raise yaml.YAMLError(f"line {line}: Python code is named on the command line only")
            seen.append(key.value)
        return node


WORDS_OF_BOOL = ("true", "false", "yes", "no", "on", "off")
EVIDENT = ("true or false", "text", "text that is not empty")  # not repeated in the help


class Parser(ArgumentParser):
    """A parser of the options of a dataclass; see `new_parser`."""

    known: dict[str, Field]  # all options by their dotted names
    sections: dict[str, str]  # names and docstrings of the dataclasses within
    _file: str | None = None

    def parse_args(self, args=None, *others, **kwargs):
        """Parse the command line, where `--name` alone means true for an option that is true or false."""
        args = list(sys.argv[1:] if args is None else args)
        for place, (word, following) in enumerate(zip(args, [*args[1:], ""], strict=True)):
            entry = self.known.get(word[2:]) if word.startswith("--") else None
            if entry and entry.type in (bool, bool | None) and following.lower() not in WORDS_OF_BOOL:
                args[place] = f"{word}=true"
        return super().parse_args(args, *others, **kwargs)

    def parse_path(self, path, *args, **kwargs):
        """Parse a YAML file, once it is known to hold a tree of options and no name of code."""
        self._file = str(path)
        try:
            content = yaml.compose(Path(path).read_text("utf-8"), Loader=_StrictLoader)
            if not isinstance(content, yaml.MappingNode):
                self.error("holds no options: want lines such as `seed: 1`; training/configs has examples")
            for key, value in content.value:
                # jsonargparse would import a name in the place of a section.
                if key.value in self.sections and not isinstance(value, yaml.MappingNode):
                    self.error(f"line {key.start_mark.line + 1}: {key.value}: want a mapping of options")
            return super().parse_path(path, *args, **kwargs)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"cannot be read: {error}")
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise RunError with the option and what it takes, or with the known name that is nearest."""
        where = f"--config {self._file}: " if self._file else ""
        keys = re.findall(r'Parser key "([\w.]+)"', message)
        unknown = re.search(
            r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'|"
            r"(?:unrecognized arguments: --|^Option ')(?P<top>[\w.]+)",
            message,
        )
        if keys and keys[-1] in self.known:
            found = re.split(r"(?:Got|Given) value: ", message)[-1] or "''"
            message = f"--{keys[-1]} {found}: want {wanted(self.known[keys[-1]].type)}"
        elif unknown:
            name = unknown["top"] or f"{unknown['group']}.{unknown['name']}"
            near = difflib.get_close_matches(name, self.known, n=1)
            message = f"--{name} is unknown" + (f"; did you mean --{near[0]}?" if near else "")
        message = message.replace('Parser key "config":', "--config wants a file:")
        raise RunError(f"{where}{message}\nAll options: --help_all")

    def describe(self, every: bool) -> str:
        """The help of all options, or of those with the mark `basic`, with a heading for each section."""
        every = every or not any(entry.metadata.get("basic") for entry in self.known.values())
        lines = [self.description, "", f"usage: {self.usage}", ""]
        for action in sorted(self._actions, key=lambda a: a.dest in {**self.known, **self.sections}):
            entry = self.known.get(action.dest)
            if action.dest in self.sections:
                heading = " ".join(f"{action.dest}: {self.sections[action.dest]}".split())
                lines += ["", *textwrap.wrap(heading, 100)] * every
                continue
            if action.help == argparse.SUPPRESS or (entry and not every and not entry.metadata.get("basic")):
                continue
            name = (action.option_strings or [action.dest])[0]
            text = " ".join(action.help.split())
            text = text if every else re.split(r"(?<=\.) ", text)[0]
            if entry and every and (takes := wanted(entry.type)) not in EVIDENT:
                text += f" Takes {takes}."
            if entry and default_of(entry) not in (None, []):
                text += f" (default: {written(default_of(entry))})"
            lines += textwrap.wrap(
                text, 100, initial_indent=f"  {name:<32} ", subsequent_indent=" " * 35, break_on_hyphens=False
            )
        return "\n".join(lines)


class _Help(argparse.Action):
    """Print the help and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.describe(every=self.const))
        parser.exit()


def new_parser(section: type, usage: str) -> Parser:
    """A parser of the options of a dataclass, with their docstrings as help.

    It raises RunError for what is unknown or of a wrong type; ranges are checked by `in_range`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(description=section.__doc__, usage=usage, allow_abbrev=False, add_help=False)
    parser.known = options(section)
    parser.sections = {e.name: e.type.__doc__ for e in fields(section) if is_dataclass(e.type)}
    quiet = {"action": _Help, "nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument(
        "--help", "-h", const=False, help="Show the options that are set most often.", **quiet
    )
    parser.add_argument("--help_all", const=True, help="Show all options.", **quiet)
    parser.add_class_arguments(section)
    return parser
