"""What the commands with argparse have in common: their help, and the folders that they write to."""

import argparse
from pathlib import Path


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default, several in one row."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help or ""
        words = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{action.help or ''} (default: {words})"


def parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring and the options with their defaults."""
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=_Help)


def make_folder(command: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """Makes a folder that does not exist, before the work whose results go there; ends with the command's error where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.exists())
        command.error(f"{option}: {file} is a file; a folder is needed")
    except OSError as error:
        command.error(f"{option}: {error}")
