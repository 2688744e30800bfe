"""The kernel for the Hugging Face Hub: as `kernels` imports it, beside the installed package."""

import ast
import importlib
import importlib.util
import json
import sys

import pytest
import torch

import safe_kernels
from release import hub_kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.write(folder)
    return folder


@pytest.fixture(scope="module")
def build(folder):
    """The CPU's build, imported under its `id` as `kernels` does it."""
    path = folder / "build" / "torch-cpu"
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients_of(library, backend):
    """The README's loss, and the gradients that reach its tensors."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=draw).requires_grad_() for n in (5, 37))
    ref_hidden = torch.randn(5, 8, generator=draw)
    tokens = torch.randint(37, (5,), generator=draw)
    stats = library.linear_token_stats(hidden, weight, tokens, ref_hidden=ref_hidden, backend=backend)
    logits = hidden @ weight.T
    below = library.token_stats(logits, tokens, backend=backend).entropy
    objective = {"old_logprob": stats.logprob.detach() - 0.1, "advantage": torch.ones(5)}
    loss = library.linear_policy_loss(hidden, weight, tokens, **objective, backend=backend).loss
    (loss - stats.logprob.mean() - stats.entropy.mean() + stats.kl.mean() + below.sum()).backward()
    return hidden.grad, weight.grad


def test_a_build_computes_the_same_beside_the_installed_package(build, backend):
    assert build is not safe_kernels and not build.__file__.startswith(
        safe_kernels.__file__.removesuffix("__init__.py")
    )
    expected = gradients_of(safe_kernels, backend)
    assert all(map(torch.equal, gradients_of(build, backend), expected))
    assert all(map(torch.equal, gradients_of(safe_kernels, backend), expected))
    assert hasattr(getattr(torch.ops, build.__name__), "linear_token_stats")


def test_a_build_is_complete_and_imports_itself_relatively(build, folder):
    path = folder / "build" / "torch-cpu"
    assert build.__all__ == safe_kernels.__all__
    for file in sorted(path.rglob("*.py")):
        parts = [part for part in file.relative_to(path).with_suffix("").parts if part != "__init__"]
        importlib.import_module(".".join([build.__name__, *parts]))
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "safe_kernels" not in {name.split(".")[0] for name in names}, file


def test_a_folder_has_what_the_builder_reads_and_what_users_load(folder):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    written = tomllib.loads((folder / "build.toml").read_text())
    assert written.keys() == {"general", "torch-noarch"}
    builds = {path.name: json.loads((path / "metadata.json").read_text()) for path in (folder / "build").iterdir()}
    assert builds.keys() == {f"torch-{backend}" for backend in written["general"]["backends"]}
    assert len({about["id"] for about in builds.values()}) == len(builds)
    for name, about in builds.items():
        assert about["backend"]["type"] == name.removeprefix("torch-") and about["id"].isidentifier()
        assert {key: about[key] for key in ("name", "version", "license")}.items() <= written["general"].items()
    copies = [folder / "torch-ext" / "safe_kernels", *(folder / "build").iterdir()]
    contents = [{path.relative_to(copy): path.read_bytes() for path in copy.rglob("*.py")} for copy in copies]
    assert all(content == contents[0] for content in contents) and "integrations" not in {
        path.parts[0] for path in contents[0]
    }


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "old").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        hub_kernel.write(tmp_path)


def test_kernels_loads_it(folder):
    kernels = pytest.importorskip("kernels", reason="the package `kernels` is not installed")
    library = kernels.get_local_kernel(folder, backend="cpu")
    expected = gradients_of(safe_kernels, "torch")
    assert all(map(torch.equal, gradients_of(library, "torch"), expected))
