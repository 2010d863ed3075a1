/** The server over HTTP. Every failure is an Error whose message is the server's sentence. */

import type { ClassData, Exported, Filter, ImageItem, ImageObjects, ProjectData, TrainState } from "./types";

/** The export was not written, because the format cannot hold everything. */
export class Losses extends Error {
  constructor(readonly losses: string[]) {
    super("The format cannot hold everything");
  }
}

export class NoAnswer extends Error {}

async function answer(path: string, options: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new NoAnswer("The server does not answer");
  }
  if (response.ok) return response;
  let sentence = `The server refused the request (${response.status})`;
  try {
    const body = (await response.json()) as { error?: unknown; losses?: unknown };
    if (Array.isArray(body.losses) && body.losses.length) throw new Losses(body.losses.map(String));
    if (typeof body.error === "string") sentence = body.error;
  } catch (error) {
    if (error instanceof Losses) throw error;
  }
  throw new Error(sentence);
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await (await answer(path, signal ? { signal } : {})).json()) as T;
}

async function send<T>(method: string, path: string, body?: object): Promise<T> {
  const options: RequestInit = { method, headers: { "Content-Type": "application/json" } };
  if (body) options.body = JSON.stringify(body);
  return (await (await answer(path, options)).json()) as T;
}

export const api = {
  project: () => get<ProjectData>("/api/project"),
  images: (start: number, count: number, only: Filter) =>
    get<{ total: number; items: ImageItem[] }>(`/api/images?start=${start}&count=${count}&only=${only}`),
  objects: (image: number) => get<ImageObjects>(`/api/images/${image}/objects`),
  pixels: (image: number, longest: number) => `/api/images/${image}/pixels?max=${longest}`,
  blob: async (path: string, signal?: AbortSignal) => (await answer(path, signal ? { signal } : {})).blob(),
  addClass: async (name: string) => {
    const answered = await send<ClassData[] | { classes: ClassData[] }>("POST", "/api/classes", { name });
    return Array.isArray(answered) ? answered : answered.classes;
  },
  export: (format: string, allowLoss: boolean) =>
    send<Exported>("POST", "/api/export", { format, allow_loss: allowLoss }),
  train: () => get<TrainState>("/api/train"),
  startTraining: (steps?: number) => send<TrainState>("POST", "/api/train", steps ? { steps } : {}),
  stopTraining: () => send<TrainState>("DELETE", "/api/train"),
};
