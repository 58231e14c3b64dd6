import re

import pytest

from polyvit_fast import experiments
from polyvit_fast.experiments.schedules_data.catalogue import DATASETS, PACKAGES, describe_licences


def test_every_package_is_needed_and_every_needed_one_is_there():
    assert {package for dataset in DATASETS.values() for package in dataset.packages} == set(PACKAGES)


@pytest.mark.parametrize("experiment", ["schedules", "schedules_transfer"])
def test_the_tasks_of_the_experiments_have_the_classes_of_their_datasets(experiment):
    for name, task in experiments.load(experiment).tasks.items():
        assert task.num_classes == len(DATASETS[name].classes) == len(set(DATASETS[name].classes))
        assert {source.path.split("/")[1] for source in (task.train, task.val, task.test) if source} == {name}


def test_packages_of_debian_have_a_digest():
    for package in PACKAGES.values():
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256) or (package.client == "pip" and not package.sha256)


def test_licences_name_every_package_with_its_datasets():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in describe_licences().splitlines() if line.startswith("| ")]
    assert rows[0] == ["package", "from", "version", "datasets", "licence"]
    assert len(rows) == 1 + len(PACKAGES)
    by_name = {row[0]: row for row in rows}
    assert by_name["klettres-data"] == ["klettres-data", "apt-get", "4:22.12.3-1", "speakers, letters", "GPL-2 or later"]
    assert all(all(row) for row in rows)
