"""What the dynamic linker sees of a library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection


@contextmanager
def _opened(path: Path) -> Iterator[ELFFile]:
    with path.open("rb") as file:
        yield ELFFile(file)


def machine(path: Path) -> str:
    """The architecture in the header, as `EM_AARCH64`."""
    with _opened(path) as library:
        return str(library["e_machine"])


def exported(path: Path) -> list[str]:
    """The symbols that other libraries can see."""
    with _opened(path) as library:
        section = library.get_section_by_name(".dynsym")
        assert isinstance(section, SymbolTableSection)
        return sorted(
            symbol.name
            for symbol in section.iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
        )


def needed(path: Path) -> list[str]:
    """The libraries that have to be loaded with it."""
    with _opened(path) as library:
        section = library.get_section_by_name(".dynamic")
        assert isinstance(section, DynamicSection)
        return sorted(tag.needed for tag in section.iter_tags("DT_NEEDED"))


def symbols(path: Path) -> set[str]:
    """Every symbol of code and data, hidden ones too."""
    with _opened(path) as library:
        section = library.get_section_by_name(".symtab")
        assert isinstance(section, SymbolTableSection)
        return {symbol.name for symbol in section.iter_symbols()}
