"""Functions of another package are replaced as a whole, put back as a whole, and never on top of somebody else's."""

import functools
import importlib
import logging
import sys
import textwrap
import threading
import types
import warnings

import pytest
import torch

from safe_kernels.integrations.patch import Patch, Replacement

SOURCES = {
    "__init__.py": "__version__ = '1.2'",
    "maths.py": """
        def double(x):
            return 2 * x

        def triple(x, *, exact=False):
            return 3 * x

        class Scale:
            @staticmethod
            def forward(ctx, x, factor):
                return x * factor

        class Actor:
            def act(self, x):
                return -x

            @staticmethod
            def rest(x):
                return x
    """,
    "user.py": """
        from .maths import double, double as twice

        def use(x):
            return double(x) + twice(x)
    """,
    "late.py": "from .maths import double",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is installed, of which `maths` and `user` are imported."""
    folder = tmp_path / "other_trainer"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / name).write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("SAFE_KERNELS_OTHER_TRAINER", raising=False)
    yield types.SimpleNamespace(
        folder=folder, **{x: importlib.import_module(f"other_trainer.{x}") for x in ("maths", "user")}
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "other_trainer"]:
        del sys.modules[name]


def hundredfold(name, *signatures, module="other_trainer.maths"):
    def make(original):
        return lambda *arguments, **options: 100 * original(*arguments, **options)

    return Replacement(module, name, signatures, make)


DOUBLE = hundredfold("double", ("x",))
TRIPLE = hundredfold("triple", ("x",), ("x", "exact"))


def test_a_function_is_replaced_under_every_name_that_it_has_in_the_package(package):
    with Patch("other_trainer", [DOUBLE]) as patch:
        assert patch.replaced == ["other_trainer.maths.double"]
        assert package.maths.double(1) == 200
        assert package.user.use(1) == 400
        assert importlib.import_module("other_trainer.late").double(1) == 200
    assert patch.replaced == []
    assert package.user.use(1) == 4
    assert sys.modules["other_trainer.late"].double is package.maths.double


@pytest.fixture
def downstream(package, monkeypatch):
    """Two modules of a package that builds on the trainer and of one that does not; both have bound its function."""
    found = []
    for name in ("built_on_it", "somebody_else"):
        module = types.ModuleType(f"{name}.trainer")
        module.double = module.twice = package.maths.double
        module.triple = package.maths.triple
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found.append(module)
    return found


def test_names_that_a_downstream_package_bound_before_are_rebound_and_no_others(package, downstream):
    theirs, others = downstream
    original = theirs.double
    patch = Patch("other_trainer", [DOUBLE], downstream=["built_on_it"])
    assert patch.status() == []
    with patch:
        assert theirs.double(1) == theirs.twice(1) == 200
        assert others.double is original  # such as the original that a test keeps to compare with
        assert theirs.triple is package.maths.triple and theirs.triple(1) == 3
        assert patch.replaced == ["other_trainer.maths.double"]
        assert sorted(patch.status()) == [
            "built_on_it.trainer.double",
            "built_on_it.trainer.twice",
            "other_trainer.maths.double",
            "other_trainer.user.double",
            "other_trainer.user.twice",
        ]
    assert theirs.double is theirs.twice is others.double is original
    assert patch.status() == []


def test_names_that_are_bound_while_the_patch_is_active_are_put_back_too(package, downstream):
    theirs, _ = downstream
    original = theirs.double
    with Patch("other_trainer", [DOUBLE], downstream=["built_on_it"]) as patch:
        theirs.bound_later = package.maths.double
        assert "built_on_it.trainer.bound_later" in patch.status()
    assert theirs.bound_later is original


def test_what_a_downstream_package_put_in_the_place_of_ours_stays(package, downstream):
    theirs, _ = downstream
    with Patch("other_trainer", [DOUBLE], downstream=["built_on_it"]) as patch:
        theirs.double = own = lambda x: 7 * x
        assert "built_on_it.trainer.double" not in patch.status()
    assert theirs.double is own and theirs.twice is package.maths.double


def test_methods_are_listed_by_their_class(package):
    with Patch("other_trainer", [hundredfold("Actor.act", ("x",))]) as patch:
        assert patch.status() == patch.replaced == ["other_trainer.maths.Actor.act"]


def test_originals_come_back_as_the_objects_they_were(package):
    before = {name: dict(vars(module)) for name, module in vars(package).items() if name != "folder"}
    act = package.maths.Actor.act
    patch = Patch("other_trainer", [DOUBLE, TRIPLE, hundredfold("Actor.act", ("x",))])
    patch.apply()
    assert package.maths.Actor.act is not act
    patch.revert()
    for name, attributes in before.items():
        assert all(vars(getattr(package, name))[key] is value for key, value in attributes.items()), name
    assert package.maths.Actor.act is act
    patch.revert()  # of nothing


def test_a_method_is_replaced_for_objects_that_exist(package):
    actor = package.maths.Actor()
    with Patch("other_trainer", [hundredfold("Actor.act", ("x",))]):
        assert actor.act(1) == -100
    assert actor.act(1) == -1


def test_a_static_method_stays_one(package):
    actor = package.maths.Actor()
    with Patch("other_trainer", [hundredfold("Actor.rest", ("x",))]):
        assert actor.rest(1) == package.maths.Actor.rest(1) == 100
    assert actor.rest(1) == package.maths.Actor.rest(1) == 1


def test_a_class_is_known_by_its_forward(package):
    def make(original):
        return type("Ours", (), {"forward": staticmethod(lambda ctx, x, factor: 0)})

    known = Replacement("other_trainer.maths", "Scale", [("x", "factor")], make)
    with Patch("other_trainer", [known]):
        assert package.maths.Scale.forward(None, 1, 2) == 0
    assert package.maths.Scale.forward(None, 1, 2) == 2


def test_applying_twice_is_applying_once(package):
    patch = Patch("other_trainer", [DOUBLE])
    assert patch.apply() is patch.apply()
    assert package.maths.double(1) == 200
    patch.revert()
    assert package.maths.double(1) == 2


def test_a_block_inside_of_what_is_applied_already_undoes_nothing(package):
    patch = Patch("other_trainer", [DOUBLE])
    with patch:
        with patch:
            pass
        assert package.maths.double(1) == 200
    assert package.maths.double(1) == 2
    with patch.apply():
        with patch.apply():
            pass
        assert package.maths.double(1) == 200
    assert package.maths.double(1) == 2
    patch.apply()
    with patch.apply():
        pass
    assert package.maths.double(1) == 200
    patch.revert()


@pytest.mark.parametrize("name", ["triple", "Actor"])  # a class without `forward` too
def test_one_unknown_signature_leaves_everything_alone_and_warns_once(package, name):
    before = dict(vars(package.maths))
    patch = Patch("other_trainer", [DOUBLE, hundredfold(name, ("x", "temperature"))])
    with pytest.warns(UserWarning, match=rf"version it does not know: other_trainer\.maths\.{name} takes \("):
        patch.apply()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch.apply().replaced == []
    assert dict(vars(package.maths)) == before
    patch.revert()


@pytest.mark.parametrize(("oldest", "is_known"), [("1.2", True), ("1.1.9", True), ("1.2.1", False), ("1.10", False)])
def test_a_version_before_the_oldest_that_was_compared_is_left_alone(oldest, is_known, package):
    patch = Patch("other_trainer", [DOUBLE], oldest=oldest)
    if is_known:
        assert patch.apply().replaced
        patch.revert()
        return
    with pytest.warns(UserWarning, match=f"version it does not know: it is 1.2, and {oldest} is the oldest"):
        patch.apply()
    assert package.maths.double(1) == 2 and not patch.replaced


def test_what_a_version_does_not_have_is_left_out(package):
    missing = [hundredfold("quadruple", ("x",)), hundredfold("double", ("x",), module="other_trainer.kernels.triton")]
    with Patch("other_trainer", [DOUBLE, *missing]) as patch:
        assert patch.replaced == ["other_trainer.maths.double"]
    with pytest.warns(UserWarning, match="none of the functions that it would replace is there"):
        assert Patch("other_trainer", missing).apply().replaced == []


def test_a_patch_without_what_it_needs_is_left_out_as_a_whole(package):
    missing = hundredfold("Actor.run", ("x",))
    with pytest.warns(UserWarning, match=r"does not know: other_trainer\.maths\.Actor\.run is not there"):
        assert Patch("other_trainer", [DOUBLE, missing], needs=[missing]).apply().replaced == []
    assert package.maths.double(1) == 2
    with Patch("other_trainer", [DOUBLE, TRIPLE, missing], needs=[DOUBLE, TRIPLE]) as patch:
        assert len(patch.replaced) == 2


@pytest.mark.parametrize("source", ["import not_there_at_all", "import sys; sys.no_such_name"])
def test_a_module_that_fails_to_import_is_no_missing_module(package, source):
    (package.folder / "broken.py").write_text(source)
    with pytest.raises((ModuleNotFoundError, AttributeError), match="not_there_at_all|no_such_name"):
        Patch("other_trainer", [hundredfold("double", ("x",), module="other_trainer.broken")]).apply()


@pytest.mark.parametrize("disguised", [False, True])
def test_a_foreign_patch_is_refused(package, disguised):
    original = package.maths.double

    def theirs(x):
        return 5 * x

    package.maths.double = functools.wraps(original)(theirs) if disguised else theirs
    patch = Patch("other_trainer", [TRIPLE, DOUBLE])
    with pytest.raises(RuntimeError, match="double comes from .*test_patch: another library has replaced it"):
        patch.apply()
    assert package.maths.double(1) == 5 and package.maths.triple(1) == 3 and patch.replaced == []


def test_two_patches_of_the_same_function_are_refused(package):
    with Patch("other_trainer", [DOUBLE]):
        with pytest.raises(RuntimeError, match="another library has replaced it"):
            Patch("other_trainer", [DOUBLE]).apply()
        assert package.maths.double(1) == 200


def test_a_function_that_the_package_itself_decorates_is_its_own(package):
    (package.folder / "decorated.py").write_text(
        "import torch\n@torch.no_grad()\ndef grow(x):\n    return x + torch.is_grad_enabled()\n"
    )
    with Patch("other_trainer", [hundredfold("grow", ("x",), module="other_trainer.decorated")]) as patch:
        assert sys.modules["other_trainer.decorated"].grow(1) == 100
        assert patch.replaced


def test_a_patch_over_ours_is_refused_when_ours_is_undone(package):
    patch = Patch("other_trainer", [TRIPLE, DOUBLE]).apply()
    ours = package.maths.double
    package.maths.double = theirs = lambda x: 5 * x
    with pytest.raises(RuntimeError, match=r"maths\.double was replaced again after safe_kernels"):
        patch.revert()
    assert package.maths.double is theirs and package.maths.triple(1) == 300
    assert patch.replaced == ["other_trainer.maths.triple"] and "other_trainer.maths.double" not in patch.status()
    package.maths.double = ours
    patch.revert()
    assert package.maths.double(1) == 2 and package.maths.triple(1) == 3


def test_a_method_that_another_replaced_after_us_is_not_listed(package, monkeypatch):
    with Patch("other_trainer", [hundredfold("Actor.act", ("x",))]) as patch, monkeypatch.context() as theirs:
        assert patch.status() == ["other_trainer.maths.Actor.act"]
        theirs.setattr(package.maths.Actor, "act", lambda self, x: x)
        assert patch.status() == patch.replaced == []


def test_threads_may_apply_and_revert_at_once(package):
    patch, failed = Patch("other_trainer", [DOUBLE, TRIPLE]), []

    def often():
        try:
            for _ in range(200):
                patch.apply()
                patch.revert()
        except Exception as error:  # noqa: BLE001 (whatever it is)
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and package.maths.double(1) == 2


def test_nothing_is_replaced_when_a_replacement_cannot_be_made(package):
    def make(original):
        raise ValueError("no kernel for this device")

    patch = Patch("other_trainer", [DOUBLE, Replacement("other_trainer.maths", "triple", [("x", "exact")], make)])
    with pytest.raises(ValueError, match="no kernel"):
        patch.apply()
    assert package.maths.double(1) == 2 and patch.replaced == []


def test_a_package_that_is_not_installed_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_trainer is not installed: there is nothing to replace"):
        Patch("no_such_trainer", [hundredfold("double", ("x",), module="no_such_trainer.maths")]).apply()


def test_the_environment_switches_a_patch_off_and_says_so_once(package, monkeypatch):
    monkeypatch.setenv("SAFE_KERNELS_OTHER_TRAINER", "0")
    patch = Patch("other_trainer", [DOUBLE])
    with pytest.warns(UserWarning, match="leaves other_trainer as it is: SAFE_KERNELS_OTHER_TRAINER is 0"):
        assert patch.apply().replaced == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.apply()
    monkeypatch.setenv("SAFE_KERNELS_OTHER_TRAINER", "1")
    assert patch.apply().replaced
    patch.revert()


def test_what_was_replaced_is_logged(package, caplog):
    with caplog.at_level(logging.INFO, logger="safe_kernels"), Patch("other_trainer", [DOUBLE, TRIPLE]):
        pass
    (record,) = caplog.records
    assert record.getMessage() == (
        "in other_trainer 1.2 these are now of safe_kernels: other_trainer.maths.double, other_trainer.maths.triple"
    )


def test_apply_of_an_autograd_function_is_known_by_its_forward(package):
    """Its own module and signature are those of PyTorch's Function."""

    class Double(torch.autograd.Function):
        __module__ = "other_trainer.maths"

        @staticmethod
        def forward(ctx, x):
            return 2 * x

    package.maths.double_of_tensors = Double.apply
    with Patch("other_trainer", [hundredfold("double_of_tensors", ("x",))]):
        assert package.maths.double_of_tensors(torch.ones(())) == 200
    assert package.maths.double_of_tensors(torch.ones(())) == 2
    Double.__module__ = "somebody_else"
    with pytest.raises(RuntimeError, match="comes from somebody_else"):
        Patch("other_trainer", [hundredfold("double_of_tensors", ("x",))]).apply()
