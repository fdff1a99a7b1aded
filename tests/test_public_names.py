"""Every public name of the package is named by a test, or is a part of something that is."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# what a test names -> what it returns or is made of, which tests need not name
THROUGH = {
    # golden cases fix every number that comes out of DiMR
    "DiMR": (
        *("Branch", "FeatureUpsampler", "BranchSettings", "resolve_branches", "trained_size"),
        "default_pyramid_weights",
    ),
    "check_alike": ("ScaleTokens",),
    "rms_norm": ("upcast",),
    "concat_norm_linear": ("compute_dtype",),
    "AxialRoPE": ("initial_log_frequencies",),
    "FlowMatching": ("velocity_is_reversed", "network_input", "extras_of"),
    "Euler": ("euler_step", "Churn"),
    # held to k-diffusion's and EDM's numbers
    "Karras": (*("LevelSchedule", "NoiseSchedule", "VPSpaced", "check_unshifted"),),
    "RungeKutta": ("Tableau", "weighted"),
    "ReverseSDE": ("Tail", "diffusion_of", "step_law"),
    "DiffusersSampler": ("check_settings",),
    # the guidance of two branches: every subclass has its own tests
    "ClassifierFree": ("BranchGuidance", "Guided", "GuidedView", "MatchedView", "extrapolate"),
    "stacked": ("Stacked",),
    "BaseSamples": ("References", "Generating"),
    "WeakModels": ("Trained",),
    "GenerationPipeline": ("PipelineParts", "Trajectories"),
    "LatentUpscaler": ("known_family",),
    "Upscaling": ("check_tiles",),
    "read_signature": ("Signature",),
    "main": (
        "help_page",  # --help
        *("train_log", "build_trainer", "usual_callbacks"),
        "print_values",
        *("settings_problems", "logger_problems", "problem_of"),
        *("is_trainable", "check_trainable", "assemble_trainable", "export_trainable"),
        *("trains_enlarger", "enlarger_problems", "picture_problems", "trainer_problems"),
        *("build_enlarger", "prepare_enlarger", "facts_writer", "export_enlarger"),
        "refuse_settings",
        # sample.py and evaluate.py with a search, and the scaling study
        *("search_setup", "build_setup", "plain_cost", "sample_requests", "check_requests"),
        *("search_records", "write_search", "write_study", "write_search_report"),
        *("write_scaling_report", "whole_page"),
    ),
    "FIT": (
        *("ComputeLayer", "LocalLayer", "start_numbers"),
        *("frames_and_sides", "check_latents", "check_clip"),
    ),
    "CausalVideo": (
        *("Attend", "Continued", "VideoAttention", "TextAttention", "project_text"),
        *("CausalVideoHead", "FrameTime"),
    ),
    "commit_frames": ("bank_frames",),
    "D2D": ("Asked", "Detections"),
    "SceneSoft": ("SoftHandle",),
    "Engine": ("Ledger",),
    "load_autoencoder": ("save_autoencoder",),
    "reconstructs": ("Reconstructed",),
    "enlarges": ("Enlarged",),
    "load_training": ("export_upscaler", "WriteFacts"),
    # results, whose fields are read
    "compare_features": ("FrechetResult",),
    "frechet_infinity": ("FrechetInfinity",),
    "inception_score": ("InceptionScore",),
    "kernel_distance": ("KernelDistance",),
    "fidelity_diversity": ("FidelityDiversity",),
    "novelty": ("Novelty",),
    "Judge": ("Agreement",),
    "plan_metrics": ("PlannedMetric",),
    "LabelMetrics": ("KeyedMetric",),
    "MEASURES": ("Measure",),
    "INCEPTION_WEIGHTS": ("PublishedWeights",),
    "write_report": (
        *("RunContents", "Evaluation", "SampleSet", "section", "headline", "curves"),
        *("newest_samples", "sample_sets", "metric_tables", "protocol_list"),
    ),
}
PARTS = {part: whole for whole, parts in THROUGH.items() for part in parts}


def public_names() -> dict[str, str]:
    """Return the module-level classes and functions without underscore, and where they are."""
    found = {}
    for path in sorted((ROOT / "genscale").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            is_name = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if is_name and not node.name.startswith("_"):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[f"{module}.{node.name}"] = node.name
    return found


def words_of_tests() -> set[str]:
    """Return all identifiers in the sources of the tests, this one left out."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    return {word for path in files for word in re.findall(r"\w+", path.read_text())}


def test_every_public_name_is_named_by_a_test() -> None:
    words = words_of_tests()
    untested = [
        place for place, name in public_names().items() if name not in words and name not in PARTS
    ]
    assert untested == [], "name them in a test, or say in THROUGH what they are a part of"


def test_the_parts_are_parts_of_what_is_tested() -> None:
    words, names = words_of_tests(), set(public_names().values())
    uses: Counter[str] = Counter()
    for path in (ROOT / "genscale").rglob("*.py"):
        uses.update(re.findall(r"\w+", path.read_text()))
    for part, whole in PARTS.items():
        assert whole in words, f"no test names {whole}, through which {part} is reached"
        assert part in names, f"{part} is gone: remove it from THROUGH"
        assert part not in words, f"{part} is named by a test: remove it from THROUGH"
        assert uses[part] > 1, f"nothing uses {part}"
