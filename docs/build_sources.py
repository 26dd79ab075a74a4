"""Sources of the documentation that are generated: the examples in sections, the API reference.

Everything is written where git does not see it: ``_build``, ``gallery`` and ``reference``.
"""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import reference_pages

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
FULL_RUNS = DOCS / "_static" / "full"

SECTIONS = {
    "ppca": (
        "Probabilistic PCA",
        [
            "ppca_em_vs_svi",
            "rank_k_reconstructions",
            "prior_monte_carlo",
            "one_table_em_px_svi",
            "bayesian_ppca",
            "how_many_dimensions",
            "impute_with_uncertainty",
            "impute_metabolites",
            "tobamovirus_map",
        ],
    ),
    "vae": (
        "Variational autoencoders",
        [
            "vae_as_model_and_guide",
            "rate_and_distortion",
            "beta_is_decoder_variance",
            "collapse",
            "latent_dimensions",
            "sheets_of_samples",
            "gradient_estimators",
            "likelihoods_on_mnist",
            "vae_mnist_gpu",
            "port_an_encoder",
            "pushforward",
            "ring",
            "topics",
            "topic_recovery",
        ],
    ),
    "autoencoders": (
        "Autoencoders",
        [
            "linear_autoencoders",
            "vae_limit",
            "denoising",
            "masked_autoencoder",
            "sparse_coding",
            "embeddings",
            "label_efficiency",
        ],
    ),
}
"""The sections of the gallery: folder, title, and the examples in their order."""

HEADER = """Gallery
=======

Each example is a short script that imports the package. The outputs and figures on these pages are
those of runs at reduced size, ``python examples/NAME.py --smoke``, which need no data sets.
Without ``--smoke`` the scripts fit longer, to more data, and take seconds to minutes.
"""


def connect(app: Any) -> None:
    """Have the sources written when a build begins, and MathJax copied when it ends."""
    reference_pages.connect(app)
    app.connect("config-inited", _write_sources, priority=1)
    app.connect("build-finished", _copy_mathjax)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _join_names, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", _name_types)
    app.connect("autodoc-skip-member", _skip_inherited)


def _write_sources(app: Any, config: Any) -> None:
    write_examples(DOCS / "_build" / "examples")
    reference_pages.write(DOCS / "reference", _replace)


def _copy_mathjax(app: Any, exception: Exception | None) -> None:
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if exception is None and found is not None and found.origin is not None:
        script = Path(found.origin).parent / "static" / "mathjax" / "tex-svg.js"
        target = Path(app.outdir) / "_static" / "mathjax"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(script, target)


def _skip_inherited(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    return True if name.startswith("set_") and name.endswith("_request") else None  # scikit-learn


def _name_types(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str
) -> tuple[str | None, str]:
    """Write programs as programs: their alias is a callable of any arguments."""
    if signature is not None:
        # The alternative, postponed annotations, would take the shapes of tensors from the page.
        signature = signature.replace("~collections.abc.Callable[[...], ~typing.Any]", PROGRAM)
    return signature, returned


PROGRAM = "~ppl_vae.core.program.ProgramLike"
SECTION = re.compile(r"[A-Z][a-z]+:$")
"""The first line of a section of a Google docstring."""


def _prepare_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Set indented formulas of a description as literal blocks, and escape what RST would read."""
    prepared: list[str] = []
    section = literal = False
    for line in lines:
        section = section or bool(SECTION.match(line))
        starts = not section and line.startswith("    ") and _last(prepared) == "paragraph"
        if starts and not prepared[-1].strip():
            prepared += ["::", ""]
            literal = True
        literal = literal and (not line.strip() or line.startswith("    "))
        prepared.append(
            line if literal or (not section and line.startswith("    ")) else _escaped(line)
        )
    lines[:] = prepared


def _join_names(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Write ``:ivar a, b:`` without spaces: Sphinx takes what stands before one as a type."""
    lines[:] = [
        f":ivar {found[1].replace(' ', '')}:{line[found.end() :]}"
        if (found := re.match(r":ivar ([^:]*, [^:]*):", line))
        else line
        for line in lines
    ]


def _last(lines: list[str]) -> str:
    """Whether the last line that is not empty ends an ordinary paragraph."""
    filled = [line for line in lines if line.strip()]
    if not filled or filled[-1].startswith(" ") or filled[-1].endswith("::"):
        return "block"
    return "list" if re.match(r"([*+-]|\d+\.|\.\.) ", filled[-1]) else "paragraph"


def _escaped(line: str) -> str:
    """A line whose bars and trailing underscores, outside of literals, are plain text."""
    line = re.sub(r"(: [A-Z])\.$", r"\1\\.", line)  # "data_dim: D." is no enumeration
    parts = re.split(r"(``.*?``|`[^`]*`)", line)
    for place in range(0, len(parts), 2):
        text = re.sub(r"\|(?=\S)|(?<=\S)\|", r"\\|", parts[place])
        parts[place] = re.sub(r"(?<=\w)_(?=[\s,.;:)]|$)", r"\\_", text)
    return "".join(parts)


def write_examples(folder: Path) -> None:
    """Copy the examples into one folder per section.

    Raises:
        ValueError: if an example is in no section, or a section names one that does not exist.
    """
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    listed = {name for _, names in SECTIONS.values() for name in names}
    if there != listed:
        raise ValueError(
            f"SECTIONS in {__file__} and {EXAMPLES} differ: not listed {sorted(there - listed)}, "
            f"not there {sorted(listed - there)}"
        )
    _replace(folder / "GALLERY_HEADER.rst", HEADER)
    for section, (title, names) in SECTIONS.items():
        _replace(folder / section / "GALLERY_HEADER.rst", f"{title}\n{'-' * len(title)}\n")
        for name in names:
            script = (EXAMPLES / f"{name}.py").read_text() + _full_run(name)
            _replace(folder / section / f"{name}.py", script)


def _full_run(name: str) -> str:
    """A last cell with the results of a full run, if ``FULL_RUNS`` has its figure and output."""
    if not (FULL_RUNS / f"{name}.png").exists():
        return ""
    output = (FULL_RUNS / f"{name}.txt").read_text().rstrip().splitlines()
    text = [
        "The full run",
        "------------",
        "",
        f"The results above are those of a run at reduced size. ``python examples/{name}.py``",
        "prints:",
        "",
        ".. code-block:: text",
        "",
        *(f"   {line}".rstrip() for line in output),
        "",
        f".. image:: /_static/full/{name}.png",
        f"   :alt: The figure of the full run of {name}",
    ]
    return "\n# %%\n" + "\n".join(f"# {line}".rstrip() for line in text) + "\n"


def _replace(path: Path, text: str) -> None:
    # An unchanged file keeps its time, so that its example does not run again.
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def listed_order(filename: str) -> int:
    """The place of an example in its section."""
    names = [name for _, listed in SECTIONS.values() for name in listed]
    return names.index(Path(filename).stem)


def section_order(folder: str) -> int:
    """The place of a section in the gallery."""
    return list(SECTIONS).index(Path(folder).name)


def smoke_arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """The command line that examples run with."""
    return ["--smoke"]


def reset_pyro(gallery_conf: dict[str, Any], filename: str) -> None:
    """Empty Pyro's parameter store between examples."""
    import pyro

    pyro.clear_param_store()
