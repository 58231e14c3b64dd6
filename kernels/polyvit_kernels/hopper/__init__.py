"""Kernels for Hopper (sm_90) in Gluon, with TMA, wgmma and mbarriers. Each module has the launchers of the portable one of its name."""
