"""What a user may write in a spec, and what is said about mistakes."""

import copy
import json
import pickle
from math import inf, nan

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import peft_core as pc
from peft_core import AdapterSpec
from peft_core.spec import check_options
from peft_core.testing.methods import register_sound

FIELDS = list(AdapterSpec.model_fields)


def test_defaults_are_filled_in() -> None:
    spec = AdapterSpec(method="sound")
    assert spec.options == {"r": 4, "alpha": 8.0}
    assert (spec.targets, spec.exclude, spec.layers, spec.train_modules) == ("all-linear", (), None, ())
    assert (spec.dropout, spec.dtype, spec.base_model) == (0.0, "float32", None)
    assert AdapterSpec(method="sound", options={"r": 4}) == spec


def test_json_and_yaml_round_trip(tmp_path) -> None:
    spec = AdapterSpec(
        method="sound",
        targets=["q_proj", "mlp.up_proj"],
        exclude=["lm_head"],
        layers=[0, 3],
        options={"r": 7},
        overrides={"q_proj": {"alpha": 2.5}, r".*\.mlp\..*": {"r": 2}},
        train_modules=["classifier"],
        dropout=0.1,
        dtype="bfloat16",
        base_model="some/model",
    )
    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert AdapterSpec.from_yaml(spec.to_yaml()) == spec
    assert AdapterSpec.from_yaml(spec.to_json()) == spec, "JSON is YAML, too"
    assert list(spec.overrides) == list(AdapterSpec.from_yaml(spec.to_yaml()).overrides), (
        "the last match wins: order counts"
    )
    for name, text in {
        "spec.json": spec.to_json(),
        "spec.yaml": spec.to_yaml(),
        "spec.yml": spec.to_yaml(),
    }.items():
        (tmp_path / name).write_text(text)
        assert AdapterSpec.from_file(tmp_path / name) == spec


class Endless(BaseModel):
    """Options without an upper bound."""

    every: float = 1.0
    rates: dict[str, float] = {}


@pytest.mark.parametrize("options", [{"every": inf}, {"every": nan}, {"every": -inf}, {"rates": {"q": inf}}], ids=str)
def test_a_number_that_no_file_can_hold_is_refused(options, refused) -> None:
    with refused(pc.SpecError, "'endless'", *options, "finite"):
        check_options(pc.MethodInfo("endless", Endless), options)


@pytest.mark.parametrize("fields", [{"options": {"r": True}}, {"overrides": {"q_proj": {"alpha": True}}}], ids=str)
def test_a_truth_value_is_no_number(fields, refused) -> None:
    with refused(pc.SpecError, "'sound'", *fields, "expected a number"):
        AdapterSpec(method="sound", **fields)


def test_spec_is_frozen(spec) -> None:
    with pytest.raises(Exception, match="frozen"):
        spec.method = "other"
    deep = AdapterSpec(method="sound", overrides={"q_proj": {"r": 2}})
    for copied in (deep, copy.deepcopy(deep), pickle.loads(pickle.dumps(deep)), deep.model_copy()):
        for options in (copied.options, copied.overrides["q_proj"]):
            with pytest.raises(TypeError, match="frozen"):
                options["r"] = 3
            with pytest.raises(TypeError, match="frozen"):
                options.update(r=3)
        assert copied == deep and dict(copied.options) == {"r": 4, "alpha": 8.0}


def test_json_schema_describes_every_field() -> None:
    schema = AdapterSpec.model_json_schema()
    assert list(schema["properties"]) == FIELDS
    assert {"method", "targets", "exclude", "layers", "options", "overrides", "train_modules"} < set(FIELDS)
    assert all(schema["properties"][name]["description"] for name in FIELDS)
    assert schema["additionalProperties"] is False and schema["required"] == ["method"]
    json.dumps(schema)


def test_unknown_method_says_what_to_install_and_what_there_is(refused) -> None:
    with refused(pc.PluginError, "'soundd'", "did you mean 'sound'?", "pip install peft-method-soundd", "sound"):
        AdapterSpec(method="soundd")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"metod": "sound"}, ["'metod'", "did you mean 'method'?"]),
        ({"method": "sound", "target": ["a"]}, ["'target'", "did you mean 'targets'?"]),
        ({"method": "sound", "train_module": ["a"]}, ["'train_module'", "did you mean 'train_modules'?"]),
        ({}, ["'method' is required"]),
        ({"method": "sound", "options": {"rank": 4}}, ["'sound'", "'rank'", "r, alpha"]),
        ({"method": "sound", "options": {"alhpa": 4}}, ["'alhpa'", "did you mean 'alpha'?"]),
        ({"method": "sound", "options": {"r": 0}}, ["'r'", "greater than or equal to 1", "got 0"]),
        ({"method": "sound", "options": {"r": "many"}}, ["'r'", "'many'"]),
        ({"method": "sound", "options": [1]}, ["'options'"]),
        (
            {"method": "sound", "overrides": {"q_proj": {"alhpa": 1}}},
            ["overrides['q_proj']", "did you mean 'alpha'?"],
        ),
        ({"method": "sound", "overrides": {"q_proj": {"r": -1}}}, ["overrides['q_proj']", "'r'"]),
        ({"method": "sound", "dropout": 1.0}, ["'dropout'", "less than 1"]),
        ({"method": "sound", "dropout": -0.1}, ["'dropout'"]),
        ({"method": "sound", "dtype": "int8"}, ["'dtype'", "'float32'", "'bfloat16'"]),
        ({"method": "sound", "targets": ""}, ["'targets'", "empty"]),
        ({"method": "sound", "targets": [3]}, ["targets"]),
        ({"method": "sound", "layers": ["first"]}, ["layers"]),
        ({"method": 3}, ["'method'"]),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_mistakes_name_the_field_and_the_remedy(fields, words, refused) -> None:
    with refused(pc.SpecError, *words):
        AdapterSpec(**fields)


@pytest.mark.parametrize("read", [AdapterSpec.from_json, AdapterSpec.from_yaml], ids=["json", "yaml"])
@pytest.mark.parametrize("text", ["", "[1, 2]", "{'unclosed: [", "3", "\t- :", "\x00"], ids=repr)
def test_text_that_is_no_spec(read, text, refused) -> None:
    with refused(pc.SpecError, "AdapterSpec"):
        read(text)


def test_file_that_cannot_be_read(tmp_path, refused) -> None:
    with refused(pc.SpecError, "missing.yaml"):
        AdapterSpec.from_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00method")
    with refused(pc.SpecError, "binary.yaml"):
        AdapterSpec.from_file(tmp_path / "binary.yaml")


def test_dropout_is_refused_by_methods_that_do_not_allow_it(refused) -> None:
    from peft_core import plugins
    from peft_core.testing.methods import Sound

    class Strict(Sound):
        name = "strict"
        capabilities = pc.Capabilities(lowrank=True, dropout=False)

    plugins.register(Strict(), "strict")
    try:
        with refused(pc.SpecError, "'strict'", "dropout"):
            AdapterSpec(method="strict", dropout=0.1)
    finally:
        plugins.unregister("strict")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=True) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "r", "alpha", "metod"]), JSON, max_size=4), st.booleans())
def test_any_input_is_a_spec_or_a_clear_error(fields, named) -> None:
    register_sound()
    try:
        spec = AdapterSpec.from_yaml(yaml.safe_dump({**fields, **({"method": "sound"} if named else {})}))
    except pc.PeftCoreError as error:
        assert "\n" not in str(error)
    else:
        assert AdapterSpec.from_json(spec.to_json()) == spec
