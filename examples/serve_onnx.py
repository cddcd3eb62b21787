"""
Serves an exported model over HTTP with onnxruntime, numpy and pillow alone: an image and a box in, the mask out.

    imedsam export --model outputs/demo -o outputs/onnx
    python examples/serve_onnx.py outputs/onnx --port 8000
    curl --data-binary @outputs/demo/example.png "http://127.0.0.1:8000/?box=24,4,86,67" -o mask.png

`class=1` picks another class than the first, `size=1024,768` another (width, height) of the mask than the image's own.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

TILE_POINTS = 16384  # of the field at once
LARGEST_BODY, LARGEST_SIDE = 64 * 2**20, 8192


class Model:
    """The three files of `imedsam export`, for images with one box each."""

    def __init__(self, folder: Path):
        self.settings = json.loads((folder / "export.json").read_text())
        self.encoder, self.prompt, self.field = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("encoder", "prompt", "field")
        )

    def segment(self, image: Image.Image, box: list[float], label: int, size: tuple[int, int]) -> np.ndarray:
        """The mask (H, W) of what is in the box, x0, y0, x1, y1 in the image's pixels; `size` is (width, height)."""
        side = self.settings["image_size"]
        (embeddings,) = self.encoder.run(None, {"pixel_values": self.prepare(image)})
        scale = np.array([side / image.width, side / image.height] * 2)
        inputs = {
            "image_embeddings": embeddings,
            "input_boxes": (np.array([box]) * scale).astype(np.float32),
            "class_labels": np.array([label]),
            "region": np.array([[-1, -1, 1, 1]], dtype=np.float32),
        }
        bound = dict(zip(("features", "prompt", "frame", "threshold"), self.prompt.run(None, inputs), strict=True))
        bound["class_labels"] = inputs["class_labels"]
        wanted = {node.name for node in self.field.get_inputs()}
        x, y = ((2 * np.arange(length) + 1) / length - 1 for length in size)  # pixel centres
        points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
        tiles = np.split(points, range(TILE_POINTS, len(points), TILE_POINTS))
        inputs = {name: value for name, value in bound.items() if name in wanted}
        logits = [self.field.run(["logits"], {**inputs, "coordinates": tile})[0][0] for tile in tiles]
        return np.concatenate(logits).reshape(size[1], size[0]) > 0

    def prepare(self, image: Image.Image) -> np.ndarray:
        """`pixel_values` (1, 3, S, S) of an image that is stretched to the square, as the processor makes them."""
        side = (self.settings["image_size"],) * 2
        planes = [plane.convert("F").resize(side, Image.Resampling.BILINEAR) for plane in image.convert("RGB").split()]
        values = np.stack([np.asarray(plane) / 255 for plane in planes])
        mean, std = (np.array(self.settings[key])[:, None, None] for key in ("image_mean", "image_std"))
        return ((values - mean) / std)[None].astype(np.float32)


def make_handler(model: Model) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                mask = self.segment()
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                self.send_error(400, explain=str(error))
                return
            picture = io.BytesIO()
            Image.fromarray(mask).save(picture, "PNG")
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(picture.tell()))
            self.end_headers()
            self.wfile.write(picture.getvalue())

        def segment(self) -> np.ndarray:
            query = parse_qs(urlparse(self.path).query)
            length = int(self.headers.get("Content-Length", 0))
            if not 0 < length <= LARGEST_BODY:
                raise ValueError(f"Expected an image of at most {LARGEST_BODY} bytes as the body, got {length}.")
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(self.rfile.read(length))))
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise ValueError(f"Expected an image of 8 bits, got one of mode {image.mode}.")
            box = numbers(query, "box", 4, "x0,y0,x1,y1 in the image's pixels")
            # As the package does, which has no boxes beyond the image.
            x0, x1 = np.clip(box[::2], 0, image.width).tolist()
            y0, y1 = np.clip(box[1::2], 0, image.height).tolist()
            if not (x0 < x1 and y0 < y1):
                raise ValueError(f"Expected box=x0,y0,x1,y1 that has a part in the image, got {box}.")
            (label,), classes = numbers(query, "class", 1, "a number", "0"), len(model.settings["classes"])
            if label not in range(classes):
                raise ValueError(f"Expected class in 0 ... {classes - 1}, got {label:g}.")
            size = numbers(query, "size", 2, "width,height", f"{image.width},{image.height}")
            if not all(length in range(1, LARGEST_SIDE + 1) for length in size):
                raise ValueError(f"Expected size=width,height of at most {LARGEST_SIDE} pixels, got {size}.")
            return model.segment(image, [x0, y0, x1, y1], int(label), (int(size[0]), int(size[1])))

    return Handler


def numbers(query: dict[str, list[str]], name: str, count: int, what: str, default: str = "") -> list[float]:
    """A parameter of so many finite numbers."""
    text = query.get(name, [default])[0]
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"Expected {name}={what}, got {text!r}.")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="What `imedsam export` wrote.")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    model = Model(args.folder)
    if model.settings["resize_mode"] != "stretch" or model.settings["window"] is not None:
        raise SystemExit("Expected a model of 8-bit images that are stretched to its square: prepare others yourself.")
    server = ThreadingHTTPServer(("127.0.0.1", args.port), make_handler(model))
    print(f"POST an image to http://127.0.0.1:{server.server_port}/?box=x0,y0,x1,y1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
