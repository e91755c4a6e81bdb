"""nuScenes in small: its thirteen tables, six cameras and map expansion, of which three scenes are left.

The car drives along the world's x axis from (600, 800), 1 m between two samples. The road reaches 10 m to either side
of that line from 400 to 800 m, with a hole from 620 to 640 m; a crossing lies at 605 to 610 m, a walkway 12 to 15 m to
the left. A car stands 10 m ahead of the first sample, a bus 20 m to its left, a pedestrian and, seen by neither lidar
nor radar, a truck beside it.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VERSION = "v1.0-trainval"
TRAIN, VAL, TEST = "scene-0004", "scene-0001", "scene-0003"
YAWS = {  # degrees to the left, in no particular order
    "CAM_FRONT": 0,
    "CAM_FRONT_RIGHT": -55,
    "CAM_BACK_RIGHT": -110,
    "CAM_BACK": 180,
    "CAM_BACK_LEFT": 110,
    "CAM_FRONT_LEFT": 55,
}
INTRINSICS = [[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]]
OBJECTS = {  # category: x, y before the first sample, (width, length, height), lidar points
    "vehicle.car": (10.0, 0.0, (1.9, 4.6, 1.7), 50),
    "vehicle.bus.rigid": (0.0, 20.0, (2.9, 11.0, 3.4), 9),
    "human.pedestrian.adult": (5.0, 5.0, (0.7, 0.7, 1.8), 7),
    "vehicle.truck": (7.0, -3.0, (2.5, 7.0, 3.0), 0),
}


def turn(degrees: float) -> list[float]:
    """Quaternion of a turn to the left."""
    half = math.radians(degrees) / 2
    return [math.cos(half), 0.0, 0.0, math.sin(half)]


def looking(degrees: float) -> list[float]:
    """Quaternion of a camera (z ahead, y down) that looks to the left by so much."""
    c, s = math.cos(math.radians(degrees) / 2) / 2, math.sin(math.radians(degrees) / 2) / 2
    return [c + s, -c - s, c - s, s - c]


def write(directory: Path, train: int = 4, test: int = 2, seed: int = 0) -> None:
    """``train`` samples of a training scene, one of a scene that detente validates on, ``test`` of an official one."""
    rng = np.random.default_rng(seed)
    tables: dict[str, list[dict[str, Any]]] = {
        "log": [{"token": "log", "logfile": "n015", "vehicle": "n015", "date_captured": "2018-07-24"}],
        "map": [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/53.png"}],
        "attribute": [{"token": "attribute", "name": "vehicle.parked", "description": ""}],
        "visibility": [{"token": "4", "level": "v80-100", "description": ""}],
        "category": [{"token": f"category-{name}", "name": name, "description": ""} for name in OBJECTS],
        "sensor": [],
        "calibrated_sensor": [],
        "scene": [],
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
        "instance": [],
        "sample_annotation": [],
    }
    tables["log"][0]["location"] = "singapore-onenorth"
    for channel in (*YAWS, "LIDAR_TOP", "RADAR_FRONT"):
        modality = {"C": "camera", "L": "lidar", "R": "radar"}[channel[0]]
        tables["sensor"].append({"token": f"sensor-{channel}", "channel": channel, "modality": modality})
        camera = channel in YAWS
        mount = {
            "token": f"mount-{channel}",
            "sensor_token": f"sensor-{channel}",
            "translation": [1.7, 0.0, 1.5] if camera else [0.9, 0.0, 1.8],
            "rotation": looking(YAWS[channel]) if camera else turn(-90),
            "camera_intrinsic": INTRINSICS if camera else [],
        }
        tables["calibrated_sensor"].append(mount)
    pictures = {channel: _jpeg(rng) for channel in YAWS}
    for scene, count in ((TRAIN, train), (VAL, 1), (TEST, test)):
        names = [f"{scene}-{number}" for number in range(count)]
        tables["scene"].append(
            {
                "token": scene,
                "log_token": "log",
                "nbr_samples": count,
                "first_sample_token": names[0],
                "last_sample_token": names[-1],
                "name": scene,
                "description": "Parked cars",
            }
        )
        for number, sample in enumerate(names):
            links = {"prev": "", "next": ""}
            tables["sample"].append({"token": sample, "timestamp": number, "scene_token": scene, **links})
            for channel in (*YAWS, "LIDAR_TOP", "RADAR_FRONT"):
                for key in (True, False):  # a sweep follows each key frame
                    _add_shot(tables, sample, channel, key, [600.0 + number + 0.5 * (not key), 800.0, 0.0])
                if channel in YAWS:
                    path = directory / f"samples/{channel}/{sample}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(pictures[channel])
            for category, (x, y, size, points) in OBJECTS.items():
                instance = f"{scene}-{category}"
                if number == 0:
                    tables["instance"].append(
                        {
                            "token": instance,
                            "category_token": f"category-{category}",
                            "nbr_annotations": count,
                            "first_annotation_token": f"{names[0]}-{category}",
                            "last_annotation_token": f"{names[-1]}-{category}",
                        }
                    )
                tables["sample_annotation"].append(
                    {
                        "token": f"{sample}-{category}",
                        "sample_token": sample,
                        "instance_token": instance,
                        "visibility_token": "4",
                        "attribute_tokens": [],
                        "translation": [600.0 + x, 800.0 + y, size[2] / 2],
                        "size": list(size),
                        "rotation": turn(0),
                        **links,
                        "num_lidar_pts": points,
                        "num_radar_pts": 0,
                    }
                )
    (directory / VERSION).mkdir(parents=True)
    for name, rows in tables.items():
        (directory / VERSION / f"{name}.json").write_text(json.dumps(rows))
    (directory / "maps/expansion").mkdir(parents=True)
    (directory / "maps/expansion/singapore-onenorth.json").write_text(json.dumps(expansion()))


def expansion() -> dict[str, Any]:
    """A map with one record per layer that is read."""
    content: dict[str, Any] = {"version": "1.3", "canvas_edge": [1585.6, 2025.0], "node": [], "polygon": [], "line": []}

    def ring(x0: float, x1: float, y0: float, y1: float) -> list[str]:
        tokens = []
        for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)):
            tokens.append(f"node-{len(content['node'])}")
            content["node"].append({"token": tokens[-1], "x": x, "y": y})
        return tokens

    def polygon(outline: list[str], *holes: list[str]) -> str:
        token = f"polygon-{len(content['polygon'])}"
        rings = [{"node_tokens": hole} for hole in holes]
        content["polygon"].append({"token": token, "exterior_node_tokens": outline, "holes": rings})
        return token

    road = polygon(ring(400, 800, 790, 810), ring(620, 640, 795, 805), [])
    content["drivable_area"] = [{"token": "road", "polygon_tokens": [road]}]
    content["ped_crossing"] = [
        {"token": "crossing", "polygon_token": polygon(ring(605, 610, 790, 810)), "road_segment_token": ""}
    ]
    content["walkway"] = [{"token": "walkway", "polygon_token": polygon(ring(400, 800, 812, 815))}]
    return content


def _add_shot(tables: dict[str, Any], sample: str, channel: str, key: bool, place: list[float]) -> None:
    token = f"{sample}-{channel}-{'key' if key else 'sweep'}"
    folder, ending = ("samples" if key else "sweeps"), ("jpg" if channel in YAWS else "pcd")
    tables["ego_pose"].append({"token": f"pose-{token}", "timestamp": 0, "rotation": turn(0), "translation": place})
    tables["sample_data"].append(
        {
            "token": token,
            "sample_token": sample,
            "ego_pose_token": f"pose-{token}",
            "calibrated_sensor_token": f"mount-{channel}",
            "timestamp": 0,
            "fileformat": ending,
            "is_key_frame": key,
            "height": 900 if channel in YAWS else 0,
            "width": 1600 if channel in YAWS else 0,
            "filename": f"{folder}/{channel}/{sample}.{ending}",
            "prev": "",
            "next": "",
        }
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    """A random colour with a white square whose corners are at pixels (400, 300) and (800, 700)."""
    image = Image.new("RGB", (1600, 900), tuple(int(x) for x in rng.integers(0, 100, 3)))
    image.paste((255, 255, 255), (400, 300, 800, 700))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()
