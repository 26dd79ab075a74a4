"""Data at the boundary: as tensors of a pair's dtype and device, with missing values as a mask."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.arrays.magnitude import check_magnitude
from ppl_vae.core.arrays.schema import RowLabels, TableSchema
from ppl_vae.core.introspection import bound_object, filter_kwargs, own_modules, placement
from ppl_vae.core.program import Program, ProgramLike, refuse_random
from ppl_vae.core.validation import (
    ArrayLike,
    as_matrix,
    check_rows_observed,
    observed_mask,
)


def as_data_and_mask(
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    model: ProgramLike,
    guide: ProgramLike | None = None,
    name: str = "x",
    allow_empty_rows: bool = False,
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "N D"] | None]:
    """Data where a pair can use them: zeros in place of missing values, and the mask that says
    where they are.

    Args:
        x: the data; NaN marks a missing value.
        mask: True where observed, of x's shape; missing values are where it is False or x is NaN.
        model, guide: the pair, for dtype, device, and whether the model takes ``mask``.
        name: the name of x in messages.
        allow_empty_rows: whether rows may have nothing observed.

    Returns:
        x with zeros in place of missing values, and the mask, or None if nothing is missing.

    Raises:
        ValueError: if something is missing and the model takes no ``mask``, if mask has another
            shape, or if a row has nothing observed and ``allow_empty_rows`` is False; and as
            :func:`ppl_vae.core.validation.as_matrix`.
    """
    programs = [model] if guide is None else [model, guide]
    check_parameters_not_random(*programs)
    placed: dict[str, Any] = placement(*programs)
    if not placed and not isinstance(x, Tensor):
        placed = {"dtype": torch.get_default_dtype()}
    schema = schema_of(model) or TableSchema.of(x)
    x = as_matrix(x, name=name, mask=mask, schema=schema_of(model), **placed)
    width = getattr(bound_object(model), "data_dim", x.shape[1])
    if x.shape[1] != width:
        raise ValueError(
            f"{name} must have shape (rows, {width}) for this model; it has {tuple(x.shape)}"
        )
    check_magnitude(x, name=name, schema=schema)
    observed = observed_mask(x)
    if observed is None:
        return x, None
    if not allow_empty_rows:
        check_rows_observed(observed, name=name)
    return _with_zeros(x, observed, model, name)


def _with_zeros(
    x: Tensor, observed: Tensor, model: ProgramLike, name: str
) -> tuple[Tensor, Tensor]:
    if "mask" not in filter_kwargs(model, {"mask": observed}):
        raise ValueError(
            f"{name} has {int((~observed).sum())} missing entries, but the model takes no keyword "
            "'mask'; let it take one (p(x given z).mask(mask).to_event(1)), or fill the missing "
            "values"
        )
    return torch.where(observed, x, torch.zeros_like(x)), observed


def schema_of(program: Any) -> TableSchema | None:
    """The schema of the frame that a program of the package, or the object whose method it is, was
    fitted to; None for others."""
    schema = None if program is None else getattr(bound_object(program), "schema", None)
    return schema if isinstance(schema, TableSchema) else None


def learn_schema(program: ProgramLike, schema: TableSchema | None) -> None:
    """Let a program of the package keep the schema of the frame that it was fitted to.

    One that it has already stays, since the frame was matched to it.
    """
    owner = bound_object(program)
    if isinstance(owner, Program) and owner.schema is None:
        owner.schema = schema


def labels_of(x: ArrayLike, program: ProgramLike | None = None) -> RowLabels:
    """The labels of the rows of x, and of its columns in the order of the program."""
    return RowLabels.of(x, None if program is None else schema_of(program))


def as_rows(
    x: ArrayLike, like: Tensor, width: int | None = None, schema: TableSchema | None = None
) -> Tensor:
    """x as a program's own tensor: its dtype and device, 2-d, of the stated width.

    Args:
        x: a tensor, which keeps its gradient, or data of another kind.
        like: a tensor of the program.
        width: the number of columns.
        schema: the schema of the frame that the program was fitted to.

    Raises:
        ValueError: if x is not 2-d or has another width.
    """
    x = x if isinstance(x, Tensor) else as_matrix(x, schema=schema)
    if x.dim() != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(
            f"x must have shape (rows, {width or 'columns'}) here; it has shape {tuple(x.shape)}"
        )
    return x.to(like)


def check_support(model: ProgramLike, x: Tensor, mask: Tensor | None) -> None:
    """Call the model's ``check_data(x, mask)``, if it has one: it refuses data outside its
    support."""
    check = getattr(bound_object(model), "check_data", None)
    if check is not None:
        check(x, mask)


def check_named_support(model: ProgramLike, x: Tensor, mask: Tensor | None, name: str) -> None:
    """:func:`check_support` of data that have another name than x, which messages begin with."""
    try:
        check_support(model, x, mask)
    except ValueError as error:
        if name == "x":
            raise
        raise ValueError(f"{name}: {error}") from error


def check_parameters_not_random(*programs: ProgramLike) -> None:
    """Check that no attribute of the package's programs was replaced by a ``PyroSample``.

    Raises:
        ValueError: naming the attribute.
    """
    for program in own_modules(*programs):
        if isinstance(program, Program):
            for name, part in program.named_children():
                refuse_random(program, name, part)
