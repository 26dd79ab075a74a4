"""The equations of the API reference, by page and heading: a formula, what it is, its source."""

EQUATIONS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("models", "Probabilistic PCA and factor analysis"): (
        "The model, its marginal density, and the posterior of z:",
        r"""z_n \sim N(0, I), \quad x_n \mid z_n \sim N(W z_n + \mu, \Psi), \\
x_n \sim N(\mu, W W^\top + \Psi), \\
z_n \mid x_n \sim N\big(P^{-1} W^\top \Psi^{-1} (x_n - \mu),\, P^{-1}\big), \\
P = I + W^\top \Psi^{-1} W""",
        "Tipping and Bishop (1999)",
    ),
    ("models", "Variational autoencoder"): (
        "The model, with a decoder network g:",
        r"""z_n \sim N(0, I), \\
x_n \mid z_n \sim p\big(x \mid g(z_n)\big)""",
        "Kingma and Welling (2014)",
    ),
    ("guides", "Guides"): (
        "The guide of an encoder network f, with draws as functions of noise:",
        r"""q(z \mid x_n) = N\big(m(x_n), L(x_n) L(x_n)^\top\big), \quad (m, L) = f(x_n), \\
z = m(x_n) + L(x_n)\, \epsilon, \quad \epsilon \sim N(0, I)""",
        "Kingma and Welling (2014)",
    ),
    ("likelihoods", "Gaussian likelihoods"): (
        "The log density, in nats:",
        r"""\log p(x \mid z) = -\sum_d \Big[\tfrac{(x_d - g_d(z))^2}{2 \sigma_d^2}
+ \log \sigma_d + \tfrac12 \log 2\pi\Big]""",
        "",
    ),
    ("objectives", "ELBO and IWAE"): (
        "Bounds on log p(x), with S draws from q:",
        r"""\mathrm{ELBO}_\beta(x) = \mathrm{E}_q \log p(x \mid z)
- \beta\, \mathrm{KL}\big(q(z \mid x) \,\|\, p(z)\big), \\
\mathrm{IWAE}_S(x) = \mathrm{E} \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s \mid x)}""",
        "Kingma and Welling (2014); Burda, Grosse and Salakhutdinov (2016)",
    ),
    ("objectives", "Gradient estimators"): (
        "The doubly reparameterized gradient of the IWAE bound for the parameters of q, with "
        "normalised weights:",
        r"""\nabla_\phi \mathrm{IWAE}_S = \mathrm{E} \sum_s \tilde w_s^2\,
\frac{\partial \log w_s}{\partial z_s} \frac{\partial z_s}{\partial \phi}, \\
\tilde w_s = \frac{w_s}{\sum_t w_t}, \quad w_s = \frac{p(x, z_s)}{q(z_s \mid x)}""",
        "Tucker, Lawson, Gu and Maddison (2019)",
    ),
    ("inference", "EM and variational EM"): (
        "The maximum of the likelihood for isotropic noise, from the eigenvalues and eigenvectors "
        "of the sample covariance, and the M-step of W otherwise:",
        r"""W = U_K (\Lambda_K - \sigma^2 I)^{1/2}, \\
\sigma^2 = \frac{1}{D - K} \sum_{i > K} \lambda_i; \\
W \leftarrow \Big[\sum_n (x_n - \mu)\, \mathrm{E} z_n^\top\Big]
\Big[\sum_n \mathrm{E} z_n z_n^\top\Big]^{-1}""",
        "Tipping and Bishop (1999)",
    ),
    ("inference", "Missing values in EM"): (
        "The posterior of z given the observed entries o of a row:",
        r"""P_n = I + W_o^\top \Psi_o^{-1} W_o, \\
\mathrm{E} z_n = P_n^{-1} W_o^\top \Psi_o^{-1} (x_{n,o} - \mu_o)""",
        "",
    ),
    ("inference", "Stochastic variational inference"): (
        "The objective of a step on a batch B, in nats per datum:",
        r"\frac{1}{|B|} \sum_{n \in B} \mathrm{ELBO}(x_n)",
        "",
    ),
    ("inference", "Variational Bayes"): (
        "The bound on the evidence, where q factorises over Z and the parameters:",
        r"""\log p(X) \ge \mathrm{E}_q \log p(X, Z, \theta)
- \mathrm{E}_q \log q(Z) - \mathrm{E}_q \log q(\theta)""",
        "Bishop (1999)",
    ),
    ("evaluation", "Marginal likelihood"): (
        "The estimate and its standard error, from S weights:",
        r"""\log \hat p(x) = \log \frac1S \sum_{s=1}^S w_s, \\
w_s = \frac{p(x, z_s)}{q(z_s)}, \\
\mathrm{se} = \frac{\mathrm{sd}(w)}{\sqrt S\, \bar w}""",
        "",
    ),
    ("evaluation", "Annealing and bounds from both sides"): (
        "The distributions of the path, and the log weight of a chain:",
        r"""p_t(z) \propto q(z)^{1 - \beta_t}\, p(x, z)^{\beta_t}, \\
\log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{q(z_{t-1})}""",
        "Neal (2001)",
    ),
    ("evaluation", "Approximation and amortization gaps"): (
        "The two parts of the inference gap, where q* is the best member of the family for x:",
        r"""\log p(x) - \mathrm{ELBO}(q) = \big[\log p(x) - \mathrm{ELBO}(q^*)\big]
+ \big[\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)\big]""",
        "Cremer, Li and Duvenaud (2018)",
    ),
    ("evaluation", "Posterior collapse"): (
        "The mean KL is the information in the codes plus the distance of their distribution from "
        "the prior:",
        r"""\frac1N \sum_n \mathrm{KL}\big(q(z \mid x_n) \,\|\, p(z)\big)
= I_q(n; z) + \mathrm{KL}\big(q(z) \,\|\, p(z)\big), \\
q(z) = \frac1N \sum_n q(z \mid x_n)""",
        "Hoffman and Johnson (2016)",
    ),
    ("evaluation", "Imputation"): (
        "For linear models, the mean of the missing entries m given the observed ones o:",
        r"\mathrm{E}[x_m \mid x_o] = \mu_m + W_m \mathrm{E}[z \mid x_o]",
        "",
    ),
    ("evaluation", "Evidence and the number of latent dimensions"): (
        "The posterior of K:",
        r"p(K \mid X) \propto p(K) \int p(X \mid \theta, K)\, p(\theta \mid K)\, d\theta",
        "",
    ),
    ("evaluation", "Calibration"): (
        "If parameters are drawn from the prior, data given them, and L draws from the exact "
        "posterior given the data, then the rank of the former among the latter is uniform:",
        r"""\mathrm{rank} = \sum_{l=1}^L 1\{\theta_l < \theta\}, \\
P(\mathrm{rank} = r) = \frac{1}{L + 1}, \quad r = 0, \dots, L""",
        "Talts et al. (2018)",
    ),
}


def equation(page: str, heading: str) -> list[str]:
    """The lines of the equation under a heading; none if there is none."""
    if (page, heading) not in EQUATIONS:
        return []
    text, formula, source = EQUATIONS[page, heading]
    lines = [f"   {line}" for line in formula.splitlines()]
    cited = ["", f"Source: {source}."] if source else []
    return [text, "", ".. math::", "", *lines, *cited, ""]
