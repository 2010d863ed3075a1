/** Reads what the server sends of an embedding: a safetensors file with values of 16 or 32 bits. */

export interface Tensor {
  shape: number[];
  values: Float32Array;
}

export interface Tensors {
  about: Record<string, string>;
  tensors: Map<string, Tensor>;
}

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

export function read(file: ArrayBuffer): Tensors {
  const length = Number(new DataView(file).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length))) as Record<string, unknown>;
  const tensors = new Map<string, Tensor>();
  for (const [name, value] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets } = value as Entry;
    const data = file.slice(8 + length + data_offsets[0], 8 + length + data_offsets[1]);
    if (dtype !== "F16" && dtype !== "F32") throw new Error(`values of type ${dtype} cannot be read`);
    tensors.set(name, { shape, values: dtype === "F32" ? new Float32Array(data) : fromHalf(new Uint16Array(data)) });
  }
  return { about: (header["__metadata__"] ?? {}) as Record<string, string>, tensors };
}

let table: Float32Array | undefined;

/** Numbers of 16 bits, by a table of all of them. */
export function fromHalf(halves: Uint16Array): Float32Array {
  if (!table) {
    table = new Float32Array(1 << 16);
    for (let bits = 0; bits < 1 << 16; bits++) {
      const exponent = (bits >> 10) & 31;
      const fraction = bits & 1023;
      const size =
        exponent === 31
          ? fraction
            ? NaN
            : Infinity
          : exponent
            ? (1 + fraction / 1024) * 2 ** (exponent - 15)
            : (fraction / 1024) * 2 ** -14;
      table[bits] = bits & 0x8000 ? -size : size;
    }
  }
  const result = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) result[i] = table[halves[i]!]!;
  return result;
}
