"""Closed form, EM, PX-EM and variational EM of PPCA and factor analysis.

=======================  =====================================================================
``fit``                  public functions: ``fit_closed_form``, ``fit_em``, ``variational_em``
``complete_data``        E- and M-step on complete data, from the sample covariance
``missing_data``         E- and M-step on data with missing values, from blocks of rows
``noise``                the M-step of the noise variances
``closed_form``          the optimal loadings for a covariance matrix
``profile_likelihood``   the optimal noise variances of factor analysis for a covariance matrix
``expected_covariance``  the covariance of the completed data, given the observed entries
``state``                what both kinds of data share: an iteration, and its certificate
``run``, ``history``     the iterations, their stopping rule, and the record of the objective
=======================  =====================================================================

Missing values enter in ``missing_data`` alone: in the E-step each row's posterior is conditioned
on its observed entries, and in the M-step each column is regressed on z over the rows in which it
is observed.
"""
