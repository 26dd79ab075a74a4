"""A model that was fitted to a table, applied to rows in the units of the table."""

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppl_vae.core.arrays.inputs import as_data_and_mask
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.core.imputed import Imputation
from ppl_vae.core.state import eval_mode, seeded
from ppl_vae.core.text import counted
from ppl_vae.core.validation import as_matrix
from ppl_vae.data.files.tables import Table
from ppl_vae.data.units import Units
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood, exact_result
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.imputation import impute
from ppl_vae.fitted.metadata import FitMetadata
from ppl_vae.inference.mcmc.samples import PosteriorSamples
from ppl_vae.likelihoods.discrete import Multinomial
from ppl_vae.models.autoencoder import Autoencoder
from ppl_vae.models.bayesian_ppca import BayesianPPCA
from ppl_vae.models.latent_variable_model import reference_tensor
from ppl_vae.models.ppca import PPCA
from ppl_vae.models.vae import VAE
from ppl_vae.models.variational_posterior import VBPosterior

FittedProgram: TypeAlias = PPCA | VAE | Autoencoder | VBPosterior
RowArray: TypeAlias = Float[np.ndarray, "N D"]
PARAMETER_DRAWS = 1000
"""The number of draws of the parameters of a Bayesian model that densities are averaged over."""
POSTERIOR_PREDICTIVE = "posterior predictive"


@dataclass(frozen=True)
class FittedModel:
    """A fitted program with the units and columns of its table.

    All arguments and results are in the units of the table; NaN marks a missing value. Rows with
    nothing observed have NaN as their log p, code and reconstruction.

    Attributes:
        program: a PPCA, VAE or autoencoder, or the posterior of a Bayesian PPCA.
        metadata: the metadata of the fit; None for a program that was saved without one, which is
            applied to the values as they are given.
        name: for messages, such as the folder.
    """

    program: FittedProgram
    metadata: FitMetadata | None = None
    name: str = "the model"

    @property
    def data_dim(self) -> int:
        """D, the number of columns."""
        return self.program.data_dim

    @property
    def latent_dim(self) -> int:
        """K, the number of latent dimensions."""
        return self.program.latent_dim

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; x1, x2, ... if they are not known."""
        if self.metadata is not None:
            return self.metadata.columns
        if self.schema is not None:
            return tuple(map(str, self.schema.names))
        return tuple(f"x{k + 1}" for k in range(self.data_dim))

    @property
    def schema(self) -> TableSchema | None:
        """The columns of the table that was fitted; None if they have no names."""
        schema = self.program.schema
        if schema is None or schema.names == tuple(range(self.data_dim)):
            return None
        return TableSchema(tuple(map(str, schema.names)), schema.library)

    @property
    def units(self) -> Units:
        """The units in which the program was fitted."""
        if self.metadata is not None:
            return self.metadata.units
        return Units.none(torch.zeros(1, self.data_dim, dtype=torch.float64))

    @property
    def error_unit(self) -> str:
        """The unit of reconstruction errors, which are relative to the scales of the fit."""
        scaled = self.metadata is not None and bool((self.units.scale != 1).any())
        return "standard deviations of the columns" if scaled else "units of the table"

    @property
    def has_density(self) -> bool:
        """Whether the model has a log p, which an autoencoder does not."""
        return not isinstance(self.program, Autoencoder)

    @property
    def can_sample(self) -> bool:
        """Whether rows can be drawn from the model without a table."""
        return not self._why_no_samples

    @property
    def _why_no_samples(self) -> str:
        program = self.program
        if isinstance(program, Autoencoder) and program.prior_kind == "flat":
            return "is an autoencoder without a prior on z"
        likelihood = getattr(program, "likelihood", None)
        if isinstance(likelihood, Multinomial) and likelihood.total_count is None:
            return "has multinomial counts, whose totals it takes from the rows of a table"
        return ""

    def describe(self) -> str:
        """The class and the sizes of the program, and the name of the model."""
        kind = "Bayesian PPCA" if isinstance(self.program, VBPosterior) else None
        kind = kind or type(self.program).__name__
        return f"{kind} in {self.name} (D = {self.data_dim}, K = {self.latent_dim})"

    def match(self, table: Table) -> RowArray:
        """The values of a table in the order of the model's columns.

        Columns are matched by name, as those of frames are; by position if those of the table or
        of the model have no names.

        Warns:
            UserWarning: naming columns that the model does not have, which are left out.

        Raises:
            ValueError: if columns are missing, or the number of columns differs.
        """
        places = None
        if self.schema is not None and table.has_names:
            places = self.schema.positions(table.columns, name=table.name)
        if places is not None:
            return table.values[:, places]
        if len(table.columns) != self.data_dim:
            raise ValueError(
                f"{table.name} has {counted(len(table.columns), 'column')}, and the model in "
                f"{self.name} has {self.data_dim}"
            )
        return table.values

    def in_model_units(self, values: RowArray) -> Float[Tensor, "N D"]:
        """Rows in the units and in the dtype of the program.

        Raises:
            ValueError: if they have another number of columns.
        """
        if values.ndim != 2 or values.shape[1] != self.data_dim:
            raise ValueError(
                f"the rows must have {self.data_dim} columns, as {self.name} has; their shape is "
                f"{values.shape}"
            )
        x = self.units.apply(torch.from_numpy(np.array(values, dtype=np.float64)))
        return x if isinstance(self.program, PPCA) else x.to(_dtype(self.program))

    def log_likelihood(
        self, values: RowArray, *, num_samples: int = 1000, refine: int = 0, seed: int = 0
    ) -> LogLikelihood:
        """log p of each row that has observed values, in nats, with its error and reliability.

        It is exact for PPCA, the posterior predictive density for Bayesian PPCA, and estimated by
        importance sampling for a VAE.

        Args:
            values: rows with at least one observed value each.
            num_samples: the number of draws of z per row, where log p is estimated.
            refine: steps of the optimization of each row's q before.
            seed: the seed of the draws.

        Raises:
            ValueError: for an autoencoder, which is no density; if a row has nothing observed.
        """
        x, program = self.in_model_units(values), self.program
        self._check_density("whose guide is a point mass, so that it has no log p")
        if isinstance(program, VAE):
            found = log_likelihood(
                program.model, program.guide, x, num_samples, refine=refine, seed=seed
            )
        elif isinstance(program, PPCA):
            found = exact_result(program.log_likelihood(x))
        else:
            found = _posterior_predictive(self.posterior_samples(seed), x)
        num_entries = (~x.isnan()).sum(1).to(found.value)
        return replace(found.shifted(self.units.log_jacobian(x)), num_entries=num_entries)

    def posterior_samples(self, seed: int = 0) -> PosteriorSamples:
        """Draws of the parameters of a Bayesian model, in the units of the program.

        Raises:
            TypeError: if the parameters have no posterior.
        """
        if not isinstance(self.program, VBPosterior):
            raise TypeError(f"{self.name} has one value of its parameters, and no posterior")
        guide = self.program
        noise = "diagonal" if guide.noise_rate.dim() else "isotropic"
        draws = guide.draw_parameters(PARAMETER_DRAWS, seed=seed).sites()
        return PosteriorSamples(
            draws={name: value[None].double() for name, value in draws.items()},
            sampler="variational Bayes",
            seconds=0.0,
            num_data=0,
            model=BayesianPPCA(guide.data_dim, guide.latent_dim, noise=noise),
        )

    @torch.no_grad()
    def codes(self, values: RowArray) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of z given each row, (N, K); None for a point mass."""
        x, program = self.in_model_units(values), self.program
        if isinstance(program, Autoencoder):
            return program.features(x).double(), None
        if isinstance(program, PPCA):
            found = program.posterior(x)
        elif isinstance(program, VAE):
            rows, mask = as_data_and_mask(x, model=program.model, guide=program.guide)
            with eval_mode(program):
                found = program.guide.distribution(rows, mask=mask)
        else:
            observed = ~x.isnan()
            mask = None if bool(observed.all()) else observed
            found = program.distribution(x.nan_to_num(), mask=mask)
        return found.mean.double(), found.variance.sqrt().double()

    @torch.no_grad()
    def reconstruct(self, values: RowArray) -> Float[Tensor, "N D"]:
        """The mean of x given the mean of z, missing values included."""
        if isinstance(self.program, VBPosterior):
            mean = self.program.row_mean.double()
            found = self.codes(values)[0] @ mean[:, :-1].mT + mean[:, -1]
        else:
            found = self.program.reconstruct(self.in_model_units(values))
        return self.units.undo(found.double())

    @torch.no_grad()
    def sample(self, num_samples: int, *, seed: int = 0) -> Float[Tensor, "S D"]:
        """Draws of x from the model; those of a Bayesian model have parameters of their own.

        Raises:
            ValueError: for an autoencoder with a flat prior, or multinomial counts without
                totals.
        """
        program = self.program
        if not self.can_sample:
            raise ValueError(
                f"{self.name} {self._why_no_samples}, so that no rows can be drawn from it; fit "
                "--model vae, with another likelihood than multinomial"
            )
        if not isinstance(program, VBPosterior):
            drawn = as_matrix(program.sample(num_samples, seed=seed), schema=program.schema)
            return self.units.undo(drawn.double())
        with seeded(seed):
            theta = program.draw_parameters(num_samples)
            z = torch.randn_like(theta.loadings[:, 0]).unsqueeze(-1)
            mean = (theta.loadings @ z).squeeze(-1) + theta.loc
            drawn = mean + theta.column_scale * torch.randn_like(mean)
        return self.units.undo(drawn.double())

    def impute(
        self, values: RowArray, *, num_samples: int = 1000, refine: int = 300, seed: int = 0
    ) -> Imputation:
        """The missing values given the observed ones of their rows; observed ones are unchanged.

        Args:
            values: rows; NaN marks a missing value.
            num_samples: the number of draws of z per row with missing values, for a VAE.
            refine: steps of the optimization of each row's q before, for a VAE.
            seed: the seed of the draws.

        Raises:
            ValueError: for an autoencoder.
        """
        x, program = self.in_model_units(values), self.program
        self._check_density("which has no distribution of missing values")
        if isinstance(program, PPCA):
            found = program.impute(x)
        elif isinstance(program, VAE):
            pair = program.model, program.guide
            found = impute(*pair, x, num_samples, refine=refine, seed=seed)
        else:
            samples = self.posterior_samples(seed)
            found = impute(samples.model.model, None, x, num_samples, posterior=samples, seed=seed)
        given = torch.from_numpy(np.array(values, dtype=np.float64))
        return self.units.undo_imputation(found, given)

    def _check_density(self, reason: str) -> None:
        if isinstance(self.program, Autoencoder):
            raise ValueError(
                f"{self.name} is an autoencoder, {reason}; fit --model vae, or use reconstruct"
            )


def _dtype(program: FittedProgram) -> torch.dtype:
    if isinstance(program, VBPosterior):
        return program.row_mean.dtype
    return reference_tensor(program).dtype


def _posterior_predictive(samples: PosteriorSamples, x: Tensor) -> LogLikelihood:
    # The draws are common to all rows: the error of the mean is at most the mean of the errors.
    found = samples.log_predictive(x)
    none = torch.full_like(found.value, math.nan)
    return LogLikelihood(
        value=found.value,
        standard_error=found.standard_error,
        ess=none,
        k_hat=none,
        reliable=found.value.isfinite(),
        num_samples=PARAMETER_DRAWS,
        method=POSTERIOR_PREDICTIVE,
        refine=0,
        global_error=float(found.standard_error.mean()),
    )


def observed_rows(values: RowArray) -> Bool[np.ndarray, " N"]:
    """Which rows have at least one observed value."""
    return np.asarray(np.isfinite(values).any(axis=1))
