"""The files of the experiment `schedules`, made from packages of Debian and PyPI: `python -m polyvit_fast.experiments.schedules_data`."""
