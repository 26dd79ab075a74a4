"""A fitted pair with the conversion between its internal units and the data's."""

from dataclasses import dataclass

from torch import Tensor

from ppl_vae.core.program import ProgramLike
from ppl_vae.data.units import Units
from ppl_vae.evaluation.marginal_likelihood.annealed import Annealing
from ppl_vae.evaluation.marginal_likelihood.estimate import LogLikelihood
from ppl_vae.evaluation.marginal_likelihood.importance import log_likelihood
from ppl_vae.evaluation.prediction.predictive import draw_data, latent_means, reconstruct


@dataclass(frozen=True)
class FittedPair:
    """A pair with the units of its fit; all its methods take and return data in the data's units.

    Attributes:
        name: its label in figures.
        model, guide: the pair.
        units: the units of the fit.
    """

    name: str
    model: ProgramLike
    guide: ProgramLike
    units: Units

    def latent_means(self, x: Tensor) -> dict[str, Tensor]:
        """The mean of q for each latent site."""
        return latent_means(self.model, self.guide, self.units.apply(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of x given the means of q."""
        reconstruction = reconstruct(self.model, self.guide, self.units.apply(x))
        return self.units.undo(reconstruction).to(x)

    def sample(self, like: Tensor, seed: int) -> Tensor:
        """Draws of x, as many as there are rows in ``like``."""
        return self.units.undo(draw_data(self.model, self.units.apply(like), seed=seed)).to(like)

    def annealed_log_likelihood(
        self, x: Tensor, num_chains: int, annealing: Annealing, seed: int
    ) -> LogLikelihood:
        """log p of each row by annealed importance sampling that starts from q."""
        estimate = log_likelihood(
            self.model,
            self.guide,
            self.units.apply(x),
            num_chains,
            method="annealed",
            annealing=annealing,
            seed=seed,
        )
        return estimate.shifted(self.units.log_jacobian(x))
