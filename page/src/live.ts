/** The WebSocket: requests with their answers, reconnection, and what the server tells by itself. */

import type { ServerEvent } from "./types";

export type Connection = "connecting" | "online" | "offline";

type Waiting = {
  resolve: (event: ServerEvent) => void;
  reject: (reason: Error) => void;
  progress?: ((event: ServerEvent) => void) | undefined;
};

/** The request was not answered: the connection broke, or a newer request took its place. */
export class Unanswered extends Error {}

const LONGEST_PAUSE = 8000;

export class Live {
  /** Called for every message that answers no request of this tab. */
  onEvent: (event: ServerEvent) => void = () => {};
  onConnection: (connection: Connection) => void = () => {};
  connection: Connection = "connecting";

  private socket: WebSocket | null = null;
  private waiting = new Map<number, Waiting>();
  private next = 1;
  private pause = 250;
  private timer = 0;

  constructor(private readonly url: string) {
    addEventListener("online", () => this.soon());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.soon();
    });
  }

  /** Connect now, unless connected. */
  connect(): void {
    clearTimeout(this.timer);
    if (this.socket) return;
    this.become(this.connection === "offline" ? "offline" : "connecting");
    const socket = new WebSocket(this.url);
    this.socket = socket;
    socket.onopen = () => {
      this.pause = 250;
      this.become("online");
    };
    socket.onmessage = (message) => this.receive(String(message.data));
    socket.onclose = () => this.lost(socket);
  }

  /** Number for a request; it may be sent again after a reconnection. */
  number(): number {
    return this.next++;
  }

  /** Send a message that has no answer; dropped while offline. */
  tell(message: object): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  /**
   * Send a request and wait for its answer. Rejected with `Unanswered` if the connection breaks, with an Error that
   * holds the server's sentence if it refuses. `progress` receives answers that are not the last.
   */
  ask(
    message: { op: string } & Record<string, unknown>,
    options: { request?: number; progress?: (event: ServerEvent) => void } = {},
  ): Promise<ServerEvent> {
    const request = options.request ?? this.number();
    return new Promise((resolve, reject) => {
      if (this.socket?.readyState !== WebSocket.OPEN) {
        reject(new Unanswered("offline"));
        return;
      }
      this.waiting.set(request, { resolve, reject, progress: options.progress });
      this.socket.send(JSON.stringify({ ...message, request }));
    });
  }

  private soon(): void {
    this.pause = 250;
    if (!this.socket) this.connect();
  }

  private become(connection: Connection): void {
    if (connection === this.connection) return;
    this.connection = connection;
    this.onConnection(connection);
  }

  private lost(socket: WebSocket): void {
    if (socket !== this.socket) return;
    this.socket = null;
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    this.become("offline");
    for (const { reject } of waiting) reject(new Unanswered("offline"));
    // A random share, so that many pages do not return to a restarted server at the same moment.
    this.timer = window.setTimeout(() => this.connect(), this.pause * (0.75 + Math.random() / 2));
    this.pause = Math.min(LONGEST_PAUSE, this.pause * 2);
  }

  private receive(text: string): void {
    const event = JSON.parse(text) as ServerEvent;
    const request = "request" in event ? event.request : undefined;
    const waiting = request === undefined ? undefined : this.waiting.get(request);
    if (request === undefined || !waiting) {
      this.onEvent(event);
      return;
    }
    if (event.event === "propagated") {
      waiting.progress?.(event);
      return;
    }
    this.waiting.delete(request);
    if (event.event === "error") waiting.reject(new Error(event.error));
    else if (event.event === "no-assist") waiting.reject(new Error(event.why));
    else if (event.event === "dropped") waiting.reject(new Unanswered("dropped"));
    else waiting.resolve(event);
  }
}
