"""Types and ranges of hyper-parameters, as annotations of the fields of dataclasses.

    decay: Decay[float] = 0.98                 # at least 0 and below 1
    num_bins: Positive[int] = 32               # a whole number above 0
    weight: Weight                             # a function of (Coeffs, Mix)
    attention_resolutions: tuple[Positive[int], ...] = (16,)

`diffjax.spec.build` and `diffjax.settings.check_settings` check the values of a config against
these annotations, before anything is compiled. Objects that are made in Python are not checked,
because JAX may trace their numbers. A number without a range has to be finite.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, TypeVar, Union, get_args, get_origin, is_typeddict

import jax

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """A range of numbers in mathematical notation: `"[0, 1)"` is at least 0 and below 1.

    Example:
        >>> 1.0 in Range("[0, 1)"), float("nan") in Range("[0, inf]")
        (False, False)
        >>> str(Range("[0, 1)"))
        'at least 0 and below 1'
    """

    text: str

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end, which may or may not belong to the range."""
        low, high = map(float, self.text[1:-1].split(","))
        return low, high

    def __contains__(self, number: float) -> bool:
        low, high = self.ends
        above = number >= low if self.text[0] == "[" else number > low
        return above and (number <= high if self.text[-1] == "]" else number < high)

    def __str__(self) -> str:
        low, high = self.ends
        lower = f"{'at least' if self.text[0] == '[' else 'above'} {low:.12g}"
        upper = f"{'at most' if self.text[-1] == ']' else 'below'} {high:.12g}"
        words = [lower] * math.isfinite(low) + [upper] * math.isfinite(high)
        return " and ".join(words) or "finite"


FINITE = Range("(-inf, inf)")
Probability = Annotated[T, Range("[0, 1]")]
Decay = Annotated[T, Range("[0, 1)")]
Positive = Annotated[T, Range("(0, inf)")]
AtLeastOne = Annotated[T, Range("[1, inf)")]
NotNegative = Annotated[T, Range("[0, inf)")]
NumSteps = Annotated[int, Range("[1, 1000000]")]
"""Steps from noise to data; more are a typing error, and their times alone fill the memory."""
Limit = Annotated[T, Range("(0, inf]")]
"""Above 0; infinity means that there is no limit."""
UnitTime = Annotated[T, Range("(0, 1]")]
"""A time above 0 and at most 1, for paths whose time runs from 0 to 1."""


def complaint(name: str, value: Any, declared: Any, allowed: Range = FINITE) -> str | None:
    """Why a value does not match an annotation, in one line; None if it matches.

    Args:
        name: the name of the value in the message.
        value: any value.
        declared: an annotation; every value matches an annotation of an unsupported form.
        allowed: the range of numbers, if the annotation has none.

    Example:
        >>> complaint("b2", 2.0, Decay[float])
        'b2=2.0 must be at least 0 and below 1'
        >>> complaint("num_steps", (2, 0), tuple[Positive[int], ...])
        'num_steps[1]=0 must be above 0'
        >>> complaint("weights", 3, tuple[str, ...])
        'weights=3 must be a list, as (3,)'
        >>> complaint("scale", 0.5, float | None) is None
        True
    """
    origin, inner = get_origin(declared), get_args(declared)
    if origin is Annotated:
        marks = [mark for mark in inner[1:] if isinstance(mark, Range)]
        return complaint(name, value, inner[0], *marks[:1])
    if origin is NotRequired:
        return complaint(name, value, inner[0], allowed)
    if origin in (Union, UnionType):
        found = [complaint(name, value, each, allowed) for each in inner]
        if None in found:
            return None
        # Of a group the value inside that is wrong, and not that it is no number.
        inside = [each for each in found if each and not each.startswith(f"{name}=")]
        return next(iter(inside), found[0])
    if is_typeddict(declared):
        return _group_complaint(name, value, declared)
    if declared in (int, float):
        return _number_complaint(name, value, declared, allowed)
    if origin is Callable:
        return _callable_complaint(name, value, *inner)
    if origin is Mapping:
        return _mapping_complaint(name, value, inner[1])
    if origin in (tuple, list, Sequence):
        return _list_complaint(name, value, inner, origin)
    return _class_complaint(name, value, origin or declared)


def with_fractions(value: Any, declared: Any) -> Any:
    """A value, as a float if it is a whole number and the annotation has float alone.

    A setting has the type of its default: `width: float = 2` is to take 2.5 as well.

    Example:
        >>> with_fractions(2, Decay[float]), with_fractions(2, int | None)
        (2.0, 2)
    """
    return float(value) if type(value) is int and _numbers_in(declared) == {float} else value


def _numbers_in(declared: Any) -> set[type]:
    """Which of int and float an annotation has."""
    origin, inner = get_origin(declared), get_args(declared)
    if origin in (Annotated, NotRequired):
        return _numbers_in(inner[0])
    if origin in (Union, UnionType):
        return set().union(*map(_numbers_in, inner))
    return {kind for kind in (int, float) if declared is kind}


def _number_complaint(name: str, value: Any, kind: Any, allowed: Range) -> str | None:
    if isinstance(value, jax.Array):  # Traced, perhaps.
        return None
    wanted, words = (numbers.Integral, "whole ") if kind is int else (numbers.Real, "")
    if isinstance(value, bool) or not isinstance(value, wanted):
        return _must(name, value, f"be a {words}number")
    number: Any = value
    try:
        kind(number)
    except OverflowError:  # A whole number with more digits than a float can have.
        return f"{name} must be finite, and has more digits than a number can have"
    if number in (math.inf, -math.inf) and number not in allowed:
        return _must(name, number, "be finite")
    return None if number in allowed else _must(name, number, f"be {allowed}")


def _has_keys(value: Any) -> bool:
    """Whether it is a dict or a ConfigDict, and not the class of one."""
    return hasattr(value, "keys") and not isinstance(value, type)


def _group_complaint(name: str, value: Any, declared: Any) -> str | None:
    if not _has_keys(value):
        return _must(name, value, "be a group of settings")
    fields = inspect.get_annotations(declared)
    found = (complaint(f"{name}.{key}", value[key], fields[key]) for key in value if key in fields)
    return next(filter(None, found), None)


def _mapping_complaint(name: str, value: Any, inner: Any) -> str | None:
    if not _has_keys(value):
        return _class_complaint(name, value, Mapping)
    found = (complaint(f"{name}.{key}", value[key], inner) for key in value)
    return next(filter(None, found), None)


def _list_complaint(name: str, value: Any, inner: tuple[Any, ...], origin: Any) -> str | None:
    fits = Sequence if origin is Sequence else tuple | list
    if isinstance(value, str | bytes) or not isinstance(value, fits):
        return _must(name, value, f"be a list, as ({_short(value)},)")
    kinds = inner
    if origin is not tuple or inner[1:] == (...,):
        kinds = (inner or (Any,))[:1] * len(value)
    if len(kinds) != len(value):
        return _must(name, value, f"have {len(kinds)} elements")
    found = (
        complaint(f"{name}[{i}]", *each) for i, each in enumerate(zip(value, kinds, strict=True))
    )
    return next(filter(None, found), None)


def _callable_complaint(name: str, value: Any, takes: Any, returns: Any) -> str | None:
    names = "…" if takes is ... else ", ".join(map(_name, takes))
    wrong = _must(name, value, f"map ({names}) to {_name(returns)}")
    if not callable(value):
        return wrong
    if takes is ...:
        return None
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # Some compiled functions have no signature.
        return None
    try:
        given = signature.bind(*takes).arguments
    except TypeError:
        return wrong
    own = [signature.parameters[key].annotation for key in given]
    pairs = [*zip(own, given.values(), strict=True), (signature.return_annotation, returns)]
    return wrong if any(_differ(*pair) for pair in pairs) else None


def _class_complaint(name: str, value: Any, kind: Any) -> str | None:
    kind = NoneType if kind is None else kind
    if not isinstance(kind, type) or kind is Any:
        return None
    fits = _follows(value, kind) if _is_protocol(kind) else isinstance(value, kind)
    words = {str: "text", bool: "True or False", NoneType: "None"}
    return None if fits else _must(name, value, f"be {words.get(kind, _with_article(_name(kind)))}")


def _is_protocol(kind: type) -> bool:
    """Whether a class is a protocol itself, and not a class that follows one."""
    return getattr(kind, "_is_protocol", False)


def _follows(value: Any, protocol: type) -> bool:
    """Whether an object has all members of a protocol, and can be called with its arguments."""
    missing = object()
    for each in filter(_is_protocol, protocol.__mro__):
        members = {*vars(each), *inspect.get_annotations(each)}
        public = {name for name in members if not name.startswith("_")}
        if any(inspect.getattr_static(value, name, missing) is missing for name in public):
            return False
        if "__call__" in members:
            _, *takes = inspect.signature(vars(each)["__call__"]).parameters
            if _callable_complaint("", value, takes, Any) is not None:
                return False
    return True


def _differ(one: Any, other: Any) -> bool:
    """Whether no object can match both annotations; arrays of all libraries count as one type."""
    one, other = map(_without_shape, (one, other))
    if not (isinstance(one, type) and isinstance(other, type)) or Any in (one, other):
        return False
    arrays = {"jax", "jaxlib", "numpy"}
    unknown = inspect.Parameter.empty in (one, other)
    alike = {each.__module__.partition(".")[0] for each in (one, other)} <= arrays
    return not (unknown or alike or one in other.__mro__ or other in one.__mro__)


def _without_shape(kind: Any) -> Any:
    """`jax.Array` where an annotation has the shape of an array too (`diffjax.shapes`)."""
    kinds = get_args(kind) or (kind,)
    return jax.Array if any(hasattr(each, "array_type") for each in kinds) else kind


def _must(name: str, value: Any, what: str) -> str:
    return f"{name}={_short(value)} must {what}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}…"


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
