"""The pages of the API reference: which modules stand under which heading, and links to them."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from equations import equation

PAGES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "models": (
        "Models, p(x, z)",
        {
            "Probabilistic PCA and factor analysis": ["ppca", "linear.linear_gaussian_model"],
            "Priors on the parameters": ["bayesian_ppca", "priors", "variational_posterior"],
            "Variational autoencoder": ["vae", "decoder_model", "standardization"],
            "Autoencoders": ["autoencoder"],
            "Topic models": ["topics"],
            "Classifiers": ["supervised"],
            "The generative program": ["latent_variable_model"],
            "Statistics of tables": ["linear.table_statistics", "linear.linear_gaussian"],
            "Saving and loading": ["storage"],
        },
    ),
    "guides": (
        "Guides, q(z given x)",
        {"Guides": ["guides"], "Variational families": ["families"]},
    ),
    "likelihoods": (
        "Likelihoods, p(x given z)",
        {
            "Gaussian likelihoods": ["gaussian"],
            "Binary, categorical and count data": ["discrete"],
            "The interface of likelihoods": ["base"],
        },
    ),
    "networks": (
        "Encoders and decoders",
        {
            "Perceptrons and convolutional networks": ["mlp_conv"],
            "Corruption of inputs": ["corruption"],
            "Sparse layers": ["sparse_layers"],
            "Patches of images": ["patches"],
            "Transformers": ["transformers"],
        },
    ),
    "objectives": (
        "Bounds and estimators of their gradients",
        {"ELBO and IWAE": ["bounds", "terms"], "Gradient estimators": ["gradients"]},
    ),
    "inference": (
        "Fitting",
        {
            "EM and variational EM": ["em.fit"],
            "Missing values in EM": ["em.missing_data"],
            "Stochastic variational inference": ["svi.fit", "svi.progress", "svi.convergence"],
            "Captured steps": ["svi.steps.captured_svi"],
            "Optimal noise scales": ["svi.data_statistics"],
            "Variational Bayes": ["variational_bayes.fit", "variational_bayes.result"],
            "Draws from the posterior of parameters": [
                "mcmc.sampling",
                "mcmc.samples",
                "mcmc.convergence",
                "mcmc.invariants",
                "mcmc.integrated_posterior",
            ],
            "PCA": ["sparse.pca"],
            "Dictionaries and sparse codes": [
                "sparse.dictionary",
                "sparse.map_codes",
            ],
        },
    ),
    "evaluation": (
        "Log-likelihood, gaps, latent space, prediction",
        {
            "Marginal likelihood": [
                "marginal_likelihood.importance",
                "marginal_likelihood.estimate",
            ],
            "Reliability of an estimate": [
                "marginal_likelihood.reliability",
                "marginal_likelihood.discrete_sites",
            ],
            "Annealing and bounds from both sides": [
                "marginal_likelihood.annealed",
                "marginal_likelihood.bidirectional",
            ],
            "Several estimators": ["marginal_likelihood.cross_check"],
            "Comparison of models": ["marginal_likelihood.compare"],
            "Approximation and amortization gaps": [
                "inference_gaps.gaps",
                "inference_gaps.result",
                "inference_gaps.local_optimum",
            ],
            "The bound along a fit": ["inference_gaps.bound_history"],
            "Posterior collapse": [
                "latent_space.collapse",
                "latent_space.collapse_result",
                "latent_space.collapse_statistics",
            ],
            "Subspaces and spectra": ["latent_space.subspace", "latent_space.spectrum"],
            "Interpolation and traversals": ["latent_space.traversal"],
            "Latent spaces and embeddings": [
                "latent_space.latent_spaces",
                "latent_space.embeddings",
            ],
            "Atoms of a dictionary": ["latent_space.atoms"],
            "The limit of a VAE": ["latent_space.vae_limit"],
            "Codes and predictions": ["prediction.predictive"],
            "Imputation": [
                "prediction.imputation",
                "prediction.multiple_imputation",
                "prediction.pooling",
                "prediction.masked_cv",
            ],
            "Predictive checks": ["prediction.predictive_checks"],
            "Evidence and the number of latent dimensions": [
                "evidence.latent_dims",
                "evidence.latent_dims_result",
                "evidence.log_evidence",
                "evidence.bridge_sampling",
                "evidence.laplace",
                "evidence.loo",
            ],
            "Calibration": [
                "calibration.simulation_based",
                "calibration.result",
                "calibration.rank_uniformity",
            ],
            "Denoising": ["prediction.denoising"],
            "Classification with few labels": ["prediction.label_efficiency"],
        },
    ),
    "data": (
        "Tables, images, texts",
        {
            "Reading tables": ["files.tables", "files.table_options"],
            "Writing tables": ["files.table_output"],
            "Rows and columns": [
                "sources.row_blocks",
                "sources.row_sources",
                "sources.block_source",
                "column_stats",
            ],
            "Images": ["images", "handwritten_digits", "image_grid"],
            "Texts": ["texts"],
            "Splits, units and grey values": ["splits", "units", "grey_values"],
        },
    ),
    "lineage": (
        "The stages from PCA to the VAE in one table",
        {
            "The lineage": ["run", "result", "problem", "metrics", "estimates"],
            "Stages": ["stage", "posterior_stages"],
            "The sparse lineage": ["sparse_run", "sparse_stages", "sparse_metrics"],
            "Data of the report": ["report_data", "latent_means"],
        },
    ),
    "plots": (
        "One function per figure",
        {
            "Bounds": ["bounds"],
            "Estimates of log p": ["estimates"],
            "Images": ["images"],
            "Latent spaces": ["latent_spaces"],
            "The lineage": ["lineage"],
            "Posterior of the parameters": ["predictive_checks", "latent_dims", "calibration"],
            "Dictionaries": ["dictionary"],
            "Topics": ["topics"],
            "The limit of a VAE": ["vae_limit"],
            "Classification with few labels": ["label_efficiency"],
        },
    ),
    "fitted": (
        "Models fitted to tables",
        {
            "Fitting a table": ["fit", "settings"],
            "Fitted models and their folder": ["model", "folder", "metadata", "held_out"],
            "Evaluations and imputations": ["evaluation", "filled_table"],
        },
    ),
    "report": (
        "Tables, pages and files of results",
        {
            "The lineage": ["table", "verdict", "figures"],
            "Files of results": ["archive"],
        },
    ),
    "interop": (
        "ArviZ and scikit-learn",
        {
            "ArviZ": ["arviz"],
            "PPCA for scikit-learn": ["sklearn"],
            "Encoders for scikit-learn": ["encoders", "estimators"],
        },
    ),
    "capture": ("Captured steps", {"Errors": ["graph"]}),
    "core": (
        "The contract of a pair, and results",
        {
            "Pairs and batches": ["pair", "batch"],
            "The contract of a program": [
                "program",
                "introspection",
                "arrays.inputs",
                "traces",
                "validation",
            ],
            "Data frames": ["arrays.schema", "arrays.frame_labels"],
            "Automatic guides": ["autoguides"],
            "Variables that all data share": ["global_sites"],
            "Results": ["results", "fit_result", "imputed", "stats"],
            "Process-wide state": ["state"],
            "Progress": ["stage_callback"],
            "Several processes": ["processes.ranks", "processes.messages"],
            "Errors": ["errors"],
            "Configuration": ["config"],
        },
    ),
}
"""The subject of each sub-package, and its modules under headings in their order on the page."""

ALSO = {
    "ppl_vae.models.linear.linear_gaussian": ["MissingnessPatterns"],
    "ppl_vae.models.linear.table_statistics": ["TableStatistics"],
    "ppl_vae.models.bayesian_ppca": ["ParameterDraws"],
    "ppl_vae.models.variational_posterior": ["ParameterMoments"],
    "ppl_vae.objectives.terms": ["ELBOTerms"],
    "ppl_vae.fitted.held_out": ["ReconstructionError"],
    "ppl_vae.fitted.settings": ["Run"],
    "ppl_vae.fitted.metadata": ["HeldOut", "digest_table"],
    "ppl_vae.lineage.estimates": ["PosteriorSummary"],
    "ppl_vae.inference.mcmc.samples": ["PredictiveDensity"],
    "ppl_vae.inference.mcmc.convergence": ["Diagnostics"],
    "ppl_vae.inference.mcmc.invariants": ["CanonicalLoadings", "canonical_loadings"],
    "ppl_vae.inference.mcmc.integrated_posterior": ["IntegratedPosterior"],
    "ppl_vae.evaluation.calibration.rank_uniformity": ["RankBand"],
    "ppl_vae.evaluation.inference_gaps.result": ["GlobalPart"],
    "ppl_vae.core.arrays.inputs": ["as_data_and_mask"],
    "ppl_vae.core.fit_result": ["Curve"],
    "ppl_vae.core.arrays.schema": ["RowLabels"],
    "ppl_vae.core.arrays.frame_labels": ["Labels"],
    "ppl_vae.core.stage_callback": ["StageCallback"],
    "ppl_vae.core.program": ["ProgramLike"],
    "ppl_vae.core.state": ["precision", "eval_mode", "exclusive"],
    "ppl_vae.core.traces": ["PairTraces", "check_pair"],
    "ppl_vae.core.validation": ["as_matrix"],
    "ppl_vae.data.column_stats": ["ColumnMoments", "ColumnStats"],
    "ppl_vae.data.sources.row_blocks": ["RowBlock"],
    "ppl_vae.data.units": ["Scaling"],
    "ppl_vae.evaluation.inference_gaps.bound_history": ["Ascent", "BoundSlice"],
    "ppl_vae.evaluation.inference_gaps.local_optimum": ["SphericalRadialRule"],
    "ppl_vae.evaluation.latent_space.collapse_statistics": ["CodeKL", "CollapseStatistics"],
    "ppl_vae.evaluation.latent_space.embeddings": ["Embedding"],
    "ppl_vae.evaluation.latent_space.latent_spaces": ["LatentSpace"],
    "ppl_vae.evaluation.latent_space.vae_limit": ["VAELosses"],
    "ppl_vae.evaluation.marginal_likelihood.discrete_sites": ["Undersampled"],
    "ppl_vae.evaluation.marginal_likelihood.estimate": ["DatumEstimates"],
    "ppl_vae.evaluation.marginal_likelihood.reliability": [
        "WeightSummary",
        "Reliability",
        "assess_reliability",
    ],
    "ppl_vae.evaluation.prediction.label_efficiency": ["PairedDifference"],
    "ppl_vae.evaluation.prediction.multiple_imputation": ["parameters_matter"],
    "ppl_vae.inference.svi.convergence": ["Convergence"],
    "ppl_vae.inference.svi.progress": ["ProgressCallback"],
    "ppl_vae.interop.estimators": ["CodeTransformer", "RowsWithMissingValues"],
    "ppl_vae.likelihoods.base": ["Support"],
    "ppl_vae.likelihoods.gaussian": ["NormalLikelihood"],
    "ppl_vae.lineage.stage": ["StageTable", "StageProgress", "SVISettings"],
    "ppl_vae.lineage.latent_means": ["LatentMeans"],
    "ppl_vae.lineage.metrics": ["MeanEstimate", "StageMetrics"],
    "ppl_vae.lineage.sparse_metrics": ["CodeMetrics", "SparseRow"],
    "ppl_vae.lineage.sparse_stages": ["SparseSettings"],
    "ppl_vae.models.decoder_model": ["DecoderModel"],
    "ppl_vae.models.latent_variable_model": ["LatentVariableModel", "RowProgram"],
    "ppl_vae.guides.families": ["num_scale_outputs"],
    "ppl_vae.models.linear.linear_gaussian_model": ["LinearGaussianModel"],
    "ppl_vae.models.standardization": ["Standardization"],
    "ppl_vae.objectives.gradients": ["DetachedSamples", "doubly_reparameterized"],
}
"""Names that no package exports, documented because signatures and descriptions refer to them."""


def connect(app: Any) -> None:
    """Have references resolved by the objects that they name, and private bases left out."""
    app.connect("missing-reference", _link)
    app.connect("autodoc-process-bases", _skip_private_bases)


def pages() -> Iterator[tuple[str, str]]:
    """The names and the texts of the pages, one per sub-package."""
    for name, (subject, sections) in PAGES.items():
        yield name, "\n".join(_page(name, subject, sections)) + "\n"


def _page(name: str, subject: str, sections: dict[str, list[str]]) -> Iterator[str]:
    yield from (subject, "=" * len(subject), "", f"``ppl_vae.{name}``", "")
    package = f"ppl_vae.{name}"
    listed = {f"{package}.{module}" for modules in sections.values() for module in modules}
    rest = [
        module
        for module in _modules(package)
        if module.__name__ not in listed and _exported(package, module)
    ]
    further = {_in_words(module): [module.__name__.removeprefix(f"{package}.")] for module in rest}
    for heading, modules in {**sections, **further}.items():
        yield from (heading, "-" * len(heading), "")
        yield from equation(name, heading)
        for module in modules:
            yield from _entries(package, importlib.import_module(f"{package}.{module}"))


def _entries(package: str, module: ModuleType) -> Iterator[str]:
    names = {_shown(package, module, name): name for name in _documented(package, module)}
    yield from (f".. automodule:: {module.__name__}", "   :no-members:")
    if module.__name__ in names:  # a function has the name of its module
        yield "   :no-index:"
    yield ""
    for shown, name in names.items():
        yield from (f".. auto{_kind(getattr(module, name))}:: {shown}", "")


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return "class"
    return "function" if inspect.isfunction(value) else "data"


def _in_words(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].replace("_", " ").capitalize()


def _shown(package: str, module: ModuleType, name: str) -> str:
    exported = name in _exported(package, module)
    return f"{package if exported else module.__name__}.{name}"


def _documented(package: str, module: ModuleType) -> list[str]:
    return _exported(package, module) + ALSO.get(module.__name__, [])


def _exported(package: str, module: ModuleType) -> list[str]:
    """The names that a module defines and its package exports, in the module's order."""
    root = importlib.import_module(package)
    return [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
        and name in root.__all__
        and getattr(root, name) is value
    ]


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    for each in pkgutil.walk_packages(root.__path__, f"{package}."):
        yield importlib.import_module(each.name)


def _resolve(target: str) -> tuple[Any, str]:
    """The class or function that a dotted name refers to, and the attribute of it, if any."""
    value: Any = importlib.import_module("ppl_vae")
    attribute = ""
    for part in target.split(".")[1:]:
        inside = inspect.isclass(value)
        value, before = getattr(value, part), value
        if inside:
            return before, f".{part}"
    return value, attribute


def _link(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Link a name by which an object can be imported to the place where it is documented."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("ppl_vae."):
        return None
    domain = env.get_domain("py")
    module_name, _, name = target.rpartition(".")
    if name in ALSO.get(module_name, ()) and node["reftype"] == "class":  # the alias of a type
        return domain.resolve_xref(env, node["refdoc"], app.builder, "data", target, node, content)
    try:
        value, attribute = _resolve(target)
        module = importlib.import_module(value.__module__)
    except (AttributeError, ImportError):
        return None
    package = ".".join(module.__name__.split(".")[:2])
    name = _shown(package, module, value.__name__) + attribute
    if name == target:
        return None
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], name, node, content
    )


def _skip_private_bases(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    for base in [base for base in bases if getattr(base, "__name__", "").startswith("_")]:
        place = bases.index(base)
        bases[place : place + 1] = [each for each in base.__bases__ if each is not object]


def write(folder: Path, replace: Any) -> None:
    """Write the pages, and remove those of sub-packages that there are no more."""
    wanted = dict(pages())
    for name, text in wanted.items():
        replace(folder / f"{name}.rst", text)
    for path in folder.glob("*.rst"):
        if path.stem not in wanted:
            path.unlink()
