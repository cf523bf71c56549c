"""Makes stages.npz and networks.npz from the full reference numbers: python tests/golden/detection/slim.py FOLDER

Every array is a copy, or a copy with zeros where the stage does not look: see README.md.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

LEVELS = range(2, 7)
CHANNELS = slice(None, None, 32)
MASKS = 40


def main(folder: Path) -> None:
    here, out = Path(__file__).parent, {}

    def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
        return dict(np.load(folder / f"{name}.npz")), json.loads((folder / f"{name}.json").read_text())

    unit, unit_json = load("unit")
    np.savez_compressed(here / "unit.npz", **unit, paste_image_hw=np.array(unit_json["paste_image_hw"]))
    newer = np.load(folder / "alt_mmdet_2_28_2.npz")

    for name in ("fr_r50", "mr_r50"):
        full, about = load(f"{name}_infer")
        of = f"{name}/infer/"
        meta = about["meta"]
        out[of + "image_size"] = np.array(meta["img_shape"][:2])
        out[of + "original_size"] = np.array(meta["ori_shape"][:2])
        out[of + "scale"] = np.array(meta["scale_factor"], np.float32)
        maps = [full[f"rpn_cls{level}"].shape[2:] for level in LEVELS]
        out[of + "map_sizes"] = np.array(maps)
        starts = np.cumsum([0] + [3 * h * w for h, w in maps])
        logits = np.concatenate([full[f"rpn_cls{level}"][0].transpose(1, 2, 0).reshape(-1) for level in LEVELS])
        deltas = np.zeros((len(logits), 4), np.float32)
        before = starts[full["rpn_pre_level"]] + full["rpn_pre_anchor_idx"]
        deltas[before] = full["rpn_pre_delta"]
        out[of + "rpn_logits"], out[of + "rpn_deltas"] = logits, deltas
        for key in ("proposals", "roi_level", "det_rescaled", "det_label_rescaled"):
            out[of + key] = full[key]
        out[of + "proposals_newer"] = newer[f"{name}/proposals"]

        if name == "fr_r50":
            rois, classes = np.divmod(full["cand_flat_idx"], 80)
            scores, boxes = np.zeros_like(full["cls_score"]), np.zeros_like(full["bbox_pred"]).reshape(-1, 80, 4)
            scores[rois] = full["cls_score"][rois]
            boxes[rois, classes] = full["bbox_pred"].reshape(-1, 80, 4)[rois, classes]
            out |= {of + "cls_score": scores, of + "bbox_pred": boxes.reshape(-1, 320)}
            out |= {of + "det": full["det"], of + "det_label": full["det_label"]}
            out |= {of + f"P{level}": full[f"P{level}"][:, CHANNELS] for level in range(2, 6)}
            out[of + "roi_sample_idx"] = full["roi_sample_idx"]
            out[of + "roi_sample_feat"] = full["roi_sample_feat"][:, CHANNELS]
        else:
            out[of + "mask_level"], out[of + "mask_rois"] = full["mask_level"], full["mask_rois"]
            out[of + "mask_logits_of_label"] = full["mask_logits_of_label"][:MASKS]
            out[of + "masks_packed"] = full["masks_packed"][:MASKS]

        full, about = load(f"{name}_train")
        of = f"{name}/train/"
        out[of + "map_sizes"] = np.array([full[f"rpn_cls{level}"].shape[2:] for level in LEVELS])
        scalars = about["scalars"]
        out[of + "loss_rpn_cls"] = np.array(scalars["loss_rpn_cls_per_level"])
        out[of + "loss_rpn_bbox"] = np.array(scalars["loss_rpn_bbox_per_level"])
        out[of + "loss_cls"] = np.array(scalars["roi"]["loss_cls"])
        out[of + "loss_bbox"] = np.array(scalars["roi"]["loss_bbox"])
        out[of + "loss_mask"] = np.array(scalars.get("loss_mask", np.nan))
        for image, meta in enumerate(about["meta"]):
            out[of + f"pad_size_{image}"] = np.array(meta["pad_shape"][:2])
            sampled = [full[f"rpn_{sign}_flat_{image}"] for sign in ("pos", "neg")]
            for key, kind, width, chosen in (
                ("rpn_cls", "logits", 1, np.concatenate(sampled)),
                ("rpn_reg", "deltas", 4, sampled[0]),
            ):
                flat = [full[f"{key}{level}"][image].transpose(1, 2, 0).reshape(-1, width) for level in LEVELS]
                flat = np.concatenate(flat)
                kept = np.zeros_like(flat)
                kept[chosen] = flat[chosen]
                out[of + f"rpn_{kind}_{image}"] = kept
            for key in (
                "gt_boxes", "gt_labels", "gt_masks_packed", "rpn_valid", "rpn_assign_gt_inds", "rpn_assign_max_iou",
                "rpn_pos_flat", "rpn_neg_flat", "rpn_pos_bbox_target", "proposals", "roi_assign_gt_inds",
                "roi_assign_max_iou", "roi_pos_inds", "roi_neg_inds",
            ):  # fmt: skip
                out[of + f"{key}_{image}"] = full[f"{key}_{image}"]
        keys = ["rois", "roi_labels", "roi_bbox_targets", "roi_pos_row", "roi_pos_bbox_pred_of_label"]
        keys += ["roi_cls_score"] if name == "fr_r50" else []
        keys += ["mask_rois", "mask_labels", "mask_targets_packed", "mask_logits_of_label"] if name == "mr_r50" else []
        out |= {of + key: full[key] for key in keys}

    np.savez_compressed(here / "stages.npz", **out)
    np.savez_compressed(here / "networks.npz", **networks(load))


def networks(load: Callable[[str], tuple[dict[str, np.ndarray], dict]]) -> dict[str, np.ndarray]:
    """What the whole networks take and give."""
    out = {}
    newer = np.load(Path(sys.argv[1]) / "alt_mmdet_2_28_2.npz")
    deeper, _ = load("r101_infer")
    found = "det_rescaled", "det_label_rescaled"
    for name in ("fr", "mr"):
        full, about = load(f"{name}_r50_infer")
        of = f"{name}_r50/infer/"
        out[of + "image"] = full["img_resized_bgr_u8"][..., ::-1]
        out |= {of + key: full[key] for key in found}
        out |= {f"{of}newer/{key}": newer[f"{name}_r50/{key}"] for key in found}
        out |= {f"{name}_r101/infer/{key}": deeper[f"{name}/{key}"] for key in found}
        norm = about["input"]["norm"]
        if name == "mr":
            out[of + "masks_packed"] = full["masks_packed"]

        full, about = load(f"{name}_r50_train")
        of = f"{name}_r50/train/"
        if name == "mr":
            pixels = np.round(full["img"].transpose(0, 2, 3, 1) * norm["std"] + norm["mean"]).astype(np.uint8)
            height, width = about["meta"][1]["img_shape"][:2]
            out[of + "second_image"] = pixels[1, :height, :width]
        out[of + "batch_size"] = np.array(about["batch_img_shape"][2:])
        out[of + "image_sizes"] = np.array([meta["img_shape"][:2] for meta in about["meta"]])
        out[of + "total"] = np.array(about["scalars"]["total_loss"])
        trained = {key: value["l2"] for key, value in about["grad"].items() if value is not None}
        out[of + "grad_norms"], out[of + "trained"] = np.array(list(trained.values())), np.array(list(trained))
        for key, value in full.items():
            if key.startswith(("grad:", "after_sgd:")):
                kind, _, parameter = key.partition(":")
                out[f"{of}{kind}/{parameter}"] = value
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]))
