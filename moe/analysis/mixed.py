"""Linear regression whose errors share a part within a group, fitted by restricted maximum likelihood (REML).

y = X·β + u_group + e, var(u) = ratio·σ², var(e) = v·σ² with v given per row. Runs of one model size share a dense
reference curve, so their gains err together; a prediction for a new size must carry that shared part.
Source: Patterson and Thompson 1971; the variance ratio is searched on a grid, everything else is closed form.
"""

from dataclasses import dataclass

import numpy as np

RATIOS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Candidates of var(u) / σ²."""


@dataclass(frozen=True)
class MixedFit:
    """One regression per target, on the same rows. C columns of the design, S targets."""

    beta_CS: np.ndarray
    ratio_S: np.ndarray
    """var(u) / σ² that REML chose."""
    variance_S: np.ndarray
    """σ²."""
    covariance_SCC: np.ndarray
    """Covariance of β over σ²."""

    def predict(self, design_RC: np.ndarray, v_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [R, S] of rows of a group that the fit has not seen."""
        leverage_RS = np.einsum("rc,scd,rd->rs", design_RC, self.covariance_SCC, design_RC)
        return design_RC @ self.beta_CS, np.sqrt(self.variance_S * (v_R[:, None] + self.ratio_S + leverage_RS))


def fit_mixed(design_RC: np.ndarray, target_RS: np.ndarray, v_R: np.ndarray, group_R: np.ndarray) -> MixedFit:
    """Fit every column of targets; more rows than columns of the design are the caller's to ensure."""
    num_rows, num_columns = design_RC.shape
    same_RR = (group_R[:, None] == group_R[None, :]).astype(float)
    fits, likelihoods = [], []
    for ratio in RATIOS:
        covariance_RR = np.diag(v_R) + ratio * same_RR
        weighted = np.linalg.solve(covariance_RR, np.concatenate([design_RC, target_RS], 1))
        information_CC = design_RC.T @ weighted[:, :num_columns]
        beta_CS = np.linalg.solve(information_CC, design_RC.T @ weighted[:, num_columns:])
        residual_RS = target_RS - design_RC @ beta_CS
        squares_S = np.sum(residual_RS * (weighted[:, num_columns:] - weighted[:, :num_columns] @ beta_CS), 0)
        variance_S = np.maximum(squares_S / (num_rows - num_columns), 1e-12)
        determinants = np.linalg.slogdet(covariance_RR)[1] + np.linalg.slogdet(information_CC)[1]
        likelihoods.append(-0.5 * ((num_rows - num_columns) * np.log(variance_S) + determinants))
        fits.append((beta_CS, variance_S, np.linalg.inv(information_CC)))
    best_S = np.argmax(np.stack(likelihoods), 0)
    return MixedFit(
        beta_CS=np.stack([fits[i][0][:, s] for s, i in enumerate(best_S)], 1),
        ratio_S=np.array(RATIOS)[best_S],
        variance_S=np.array([fits[i][1][s] for s, i in enumerate(best_S)]),
        covariance_SCC=np.stack([fits[i][2] for i in best_S]),
    )
