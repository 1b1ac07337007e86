// A server of grpc-js with an empty method: `node grpc_js.js DIRECTORY_WITH_NODE_MODULES`.

const { createRequire } = require("node:module");
const grpc = createRequire(`${process.argv[2]}/`)("@grpc/grpc-js");

const empty = {
  path: "/chat_ticket.bench.Bench/Empty",
  requestStream: false,
  responseStream: false,
  requestDeserialize: (bytes) => bytes,
  responseSerialize: (bytes) => bytes,
};
const server = new grpc.Server();
server.addService({ Empty: empty }, { Empty: (call, answer) => answer(null, Buffer.alloc(0)) });
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.error(JSON.stringify({ event: "listening", port }));
});
