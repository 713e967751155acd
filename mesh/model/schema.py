"""Reads plain data (dicts, lists, strings) into models and finds all that breaks the schema.

msgspec does the work; where it refuses, the data is walked once more along the type, which finds
every violation instead of the first, and leaves out nulls as the API server does: a null in a field
is an absent field. Knows types, no kinds and no rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from mesh.model.errors import FieldError, InvalidObject
from mesh.model.meta import Model

M = TypeVar("M", bound=Model)
_QUOTE = 100


def read(raw: Any, model: type[M], quote: bool = True, lenient: bool = False) -> M:
    """`raw` as `model`. InvalidObject lists every violation of the schema. With `quote` False no
    error shows a value that was found; with `lenient` unknown fields are passed over."""
    try:
        return _convert(raw, model)
    except (msgspec.ValidationError, *_UNSENDABLE):
        pass
    reader = _Reader(quote, lenient)
    clean = reader.value(model, raw, "")
    if not reader.errors:
        try:
            return _convert(clean, model)
        except _UNSENDABLE:
            reader.errors.append(FieldError("", _SENDABLE_RULE, "something in it is not; find it"))
    raise InvalidObject(tuple(reader.errors))


# What Python's strings and integers can hold and JSON cannot, and data nested without end.
_UNSENDABLE = (UnicodeEncodeError, OverflowError, RecursionError)
_SENDABLE_RULE = "text must be Unicode, integers fit into 64 bits, nesting be shallow"
_encoder = msgspec.msgpack.Encoder()


def _convert(raw: Any, model: type[M]) -> M:
    value = msgspec.convert(raw, model)
    _encoder.encode(value)
    return value


def found(value: Any) -> str:
    """A value as it stands in an error: quoted, cut where it is long, lists and objects only by
    name."""
    if isinstance(value, (list, tuple, Mapping)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _QUOTE else f"{text[:_QUOTE]}…"


def _step(key: Any) -> str:
    """A key as it stands in a path, on one line whatever it holds."""
    return key if isinstance(key, str) and key.isprintable() else ascii(key)


@cache
def hints(model: type[Model]) -> dict[str, Any]:
    """The types of a model's attributes, constraints included."""
    return get_type_hints(model, include_extras=True)


@cache
def wire_names(model: type[Model]) -> dict[str, str]:
    """Attribute names by the names that stand in manifests."""
    return dict(zip(model.__struct_encode_fields__, model.__struct_fields__, strict=True))


@cache
def required(model: type[Model]) -> frozenset[str]:
    """The manifests' names of fields without a default."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(model) if field.required)


def unwrap(hint: Any) -> tuple[Any, tuple[Meta, ...]]:
    """The type without `Annotated` and `| None`, and all constraints on it."""
    metas: tuple[Meta, ...] = ()
    while True:
        origin = get_origin(hint)
        if origin is Annotated:
            metas += tuple(meta for meta in hint.__metadata__ if isinstance(meta, Meta))
            hint = hint.__origin__
        elif origin in (Union, UnionType):
            some = [arg for arg in get_args(hint) if arg is not type(None)]
            if len(some) > 1:
                return hint, metas
            hint = some[0]
        else:
            return hint, metas


class _Reader:
    """One walk over data that msgspec refused; `value` gives it back without nulls."""

    def __init__(self, quote: bool, lenient: bool) -> None:
        self.errors: list[FieldError] = []
        self._quote = quote
        self._lenient = lenient

    def value(self, hint: Any, raw: Any, path: str) -> Any:
        bare, metas = unwrap(hint)
        if isinstance(bare, type) and issubclass(bare, Model):
            return self._struct(bare, raw, path)
        origin = get_origin(bare)
        if origin is tuple:
            return self._list(get_args(bare)[0], metas, raw, path)
        if origin is dict:
            return self._map(get_args(bare)[1], metas, raw, path)
        if isinstance(raw, str) and not _is_unicode(raw):
            self._refuse(path, "text must be Unicode", raw)
            return raw
        try:
            msgspec.convert(raw, hint)
        except msgspec.ValidationError as error:
            self._refuse(path, _keyword(bare, metas, str(error)), raw)
        return raw

    def _struct(self, model: type[Model], raw: Any, path: str) -> Any:
        if not isinstance(raw, Mapping):
            self._refuse(path, "type: object", raw)
            return raw
        clean: dict[str, Any] = {}
        attributes = wire_names(model)
        known = ", ".join(sorted(attributes))
        for name, value in raw.items():
            where = f"{path}.{_step(name)}" if path else _step(name)
            attribute = attributes.get(name)
            if attribute is None:
                if self._lenient or not model.__struct_config__.forbid_unknown_fields:
                    continue
                self.errors.append(
                    FieldError(
                        where,
                        "unknown field",
                        f"{found(name)} is not a field here; known are {known}",
                    )
                )
            elif value is not None:
                clean[name] = self.value(hints(model)[attribute], value, where)
        for name in sorted(required(model) - clean.keys()):
            where = f"{path}.{name}" if path else name
            self.errors.append(FieldError(where, "required", "is missing; add it"))
        return clean

    def _list(self, item: Any, metas: tuple[Meta, ...], raw: Any, path: str) -> Any:
        if not isinstance(raw, (list, tuple)):
            self._refuse(path, "type: array", raw)
            return raw
        self._length(metas, len(raw), "Items", path)
        return [self.value(item, value, f"{path}[{index}]") for index, value in enumerate(raw)]

    def _map(self, item: Any, metas: tuple[Meta, ...], raw: Any, path: str) -> Any:
        if not isinstance(raw, Mapping):
            self._refuse(path, "type: object", raw)
            return raw
        self._length(metas, len(raw), "Properties", path)
        for key in raw:
            if not isinstance(key, str):
                self._refuse(path, "keys must be strings", key)
            elif not _is_unicode(key):
                self._refuse(path, "keys must be Unicode", key)
        return {key: self.value(item, value, f"{path}[{_step(key)}]") for key, value in raw.items()}

    def _length(self, metas: tuple[Meta, ...], length: int, what: str, path: str) -> None:
        for meta in metas:
            if meta.min_length is not None and length < meta.min_length:
                rule = f"min{what}: {meta.min_length}"
                self.errors.append(FieldError(path, rule, f"has {length}; add some"))
            if meta.max_length is not None and length > meta.max_length:
                rule = f"max{what}: {meta.max_length}"
                self.errors.append(FieldError(path, rule, f"has {length}; take some away"))

    def _refuse(self, path: str, rule: str, raw: Any) -> None:
        if self._quote:
            message = f"found {found(raw)}"
            if not isinstance(raw, str) and rule == "type: string":
                message += f", which YAML reads as {type(raw).__name__}; put it in quotes"
        else:
            message = f"found a value of type {type(raw).__name__} that is not allowed"
        self.errors.append(FieldError(path, rule, message))


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: YAML's escapes can write half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_TYPES = {str: "string", bool: "boolean", int: "integer", bytes: "base64 text"}


def _keyword(bare: Any, metas: tuple[Meta, ...], error: str) -> str:
    """The schema keyword that msgspec's refusal of a single value is about, in the CRDs' words."""
    for meta in metas:
        for sign, word, bound in (
            ("length >=", "minLength", meta.min_length),
            ("length <=", "maxLength", meta.max_length),
            (">=", "minimum", meta.ge),
            ("<=", "maximum", meta.le),
            ("matching regex", "pattern", meta.pattern),
        ):
            if bound is not None and sign in error:
                return f"{word}: {bound}".replace(r"\Z", "$")
    if get_origin(bare) is Literal:
        if "Invalid enum value" in error:
            return f"must be one of {', '.join(map(str, get_args(bare)))}"
        types = {type(value) for value in get_args(bare)}
    else:
        types = {unwrap(one)[0] for one in get_args(bare) or (bare,)} - {type(None)}
    return f"type: {' or '.join(sorted(_TYPES.get(one, str(one)) for one in types))}"
